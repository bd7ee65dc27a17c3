"""Tensors in, tensors out: the mathematics, which needs torch only."""
