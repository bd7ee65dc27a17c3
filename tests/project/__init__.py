"""Docs, notebooks, examples and packaging."""
