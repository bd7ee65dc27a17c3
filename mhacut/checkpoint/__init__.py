"""Read, identify, load and write checkpoints, whose content is untrusted."""
