"""What is in a checkpoint: layers, heads and their redundancy."""
