"""ONNX files, and adapters beside them."""
