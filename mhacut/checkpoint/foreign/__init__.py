"""Convert checkpoints of other libraries to timm's names and arithmetic, without those libraries."""
