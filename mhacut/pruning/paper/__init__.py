"""Method of "Automatic Channel Pruning for Multi-Head Attention" (arXiv 2405.20867), ``--method paper``.

The rest of the package uses it at 3 places: calibration gathers :mod:`~.paper.statistics`, the planner calls
:func:`.indicators.search` instead of sensitivity curves, and recovery calls
:func:`.indicators.with_trained_scales` instead of the repair.
"""
