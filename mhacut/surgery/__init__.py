"""Changes of a model by a plan: cutting channels and merging tokens."""
