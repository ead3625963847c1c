"""An OpenAI-compatible HTTP server of one base model and many adapters, mixed in one batch."""
