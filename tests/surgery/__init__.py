"""A model and a plan in, the same model smaller out."""
