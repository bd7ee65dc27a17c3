"""The method: calibration, curves, plans, repair, healing."""
