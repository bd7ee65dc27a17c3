"""Exports and quantization."""
