"""Adapters: descriptions of attention and MLP classes for pruning, 1 per class."""
