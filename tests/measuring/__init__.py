"""Accuracy, latency and times of layers."""
