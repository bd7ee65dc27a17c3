"""Mathematics of pruning on tensors, without models."""
