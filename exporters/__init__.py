"""What a tuned model is turned into: an ordinary model, an adapter, a LoRA, a SHiRA, an ONNX file."""

from s2ft_compile.exporters.onnx.adapter import save_onnx_adapter
from s2ft_compile.exporters.onnx.export import export_onnx

from .adapter import load_adapter, save_adapter
from .checkpoint import merge_checkpoint
from .extraction import extract
from .lora import save_lora
from .merged import save_merged
from .shira import save_shira

__all__ = [
    "save_merged",
    "merge_checkpoint",
    "save_adapter",
    "load_adapter",
    "extract",
    "save_lora",
    "export_onnx",
    "save_onnx_adapter",
    "save_shira",
]
