"""FLatten Transformers."""
