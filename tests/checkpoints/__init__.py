"""Files of models: recognised, opened, refused, written."""
