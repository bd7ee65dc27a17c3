"""Report on a checkpoint: one HTML page, or one picture."""
