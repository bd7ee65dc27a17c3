"""Measurements of models: accuracy, agreement, normalisation and latency."""
