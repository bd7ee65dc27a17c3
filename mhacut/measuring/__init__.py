"""Measurements of models: accuracy, agreement, normalisation, latency, and figures of all of them."""
