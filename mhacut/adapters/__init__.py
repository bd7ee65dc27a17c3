"""Attention and MLP classes, each described once."""
