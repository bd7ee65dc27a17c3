"""Layers and heads of a checkpoint: what they cost, and how redundant they are."""
