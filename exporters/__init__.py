"""What a tuned model is turned into: an ordinary model, an adapter, an ONNX file."""

from .adapter import load_adapter, save_adapter
from .merged import save_merged
from .onnx import export_onnx

__all__ = ["save_merged", "save_adapter", "load_adapter", "export_onnx"]
