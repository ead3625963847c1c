"""What a tuned model is turned into: an ordinary model, an adapter, a LoRA, a SHiRA, an ONNX file."""

if __name__ != "s2ft_compile.exporters":  # a second copy would define every operator again
    raise ImportError(f"{__name__} is a folder of s2ft_compile: import s2ft_compile.exporters instead")

from typing import TYPE_CHECKING

from s2ft_compile.lazy import attributes

if TYPE_CHECKING:
    from s2ft_compile.exporters.adapter import load_adapter, save_adapter, unload_adapter
    from s2ft_compile.exporters.checkpoint import merge_checkpoint
    from s2ft_compile.exporters.extraction import extract
    from s2ft_compile.exporters.lora import save_lora
    from s2ft_compile.exporters.merged import save_merged
    from s2ft_compile.exporters.onnx.adapter import save_onnx_adapter
    from s2ft_compile.exporters.onnx.export import export_onnx
    from s2ft_compile.exporters.registration import exporter
    from s2ft_compile.exporters.shira import save_shira

__getattr__, __dir__ = attributes(
    __name__,
    {
        "load_adapter": "adapter",
        "save_adapter": "adapter",
        "unload_adapter": "adapter",
        "merge_checkpoint": "checkpoint",
        "extract": "extraction",
        "save_lora": "lora",
        "save_merged": "merged",
        "save_onnx_adapter": "onnx.adapter",
        "export_onnx": "onnx.export",
        "exporter": "registration",
        "save_shira": "shira",
    },
)

__all__ = [
    "save_merged",
    "merge_checkpoint",
    "save_adapter",
    "load_adapter",
    "unload_adapter",
    "extract",
    "save_lora",
    "export_onnx",
    "save_onnx_adapter",
    "save_shira",
    "exporter",
]
