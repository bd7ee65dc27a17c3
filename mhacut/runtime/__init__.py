"""Devices, processes, files and progress."""
