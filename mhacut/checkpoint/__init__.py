"""Read, identify, load and write checkpoints; nothing in a file is trusted."""
