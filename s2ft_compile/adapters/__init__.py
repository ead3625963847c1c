"""Adapters: their format, what they change, and many of them over one base model."""
