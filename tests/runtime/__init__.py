"""Devices, processes, progress and files."""
