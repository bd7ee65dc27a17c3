"""Cost and redundancy of the layers and heads of a checkpoint."""
