"""The way of "Automatic Channel Pruning for Multi-Head Attention" (arXiv 2405.20867), ``--method paper``.

The rest of the package meets it in three places: calibration gathers :mod:`~.paper.statistics`, the planner
calls :func:`.indicators.search` in place of sensitivity curves, and recovery calls
:func:`.indicators.with_trained_scales` in place of the repair.
"""
