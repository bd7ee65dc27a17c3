"""Checkpoints: a file read with suspicion, recognised as a timm model, and a slim file written with care."""
