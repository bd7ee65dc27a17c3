"""What can go wrong, as types. A message says what, where, expected, found and what to do next."""

from __future__ import annotations


class MhacutError(Exception):
    """A failure mhacut foresaw: the command line shows its message without a traceback and exits 1."""


class UsageError(MhacutError):
    """An argument that cannot be understood (``--flops 2,0G``): the command line exits 2."""


class CheckpointError(MhacutError):
    """A checkpoint that cannot be read, recognised, or trusted."""


class UnsupportedModelError(MhacutError):
    """A model that holds an attention class mhacut cannot cut, or none at all."""


class PlanError(MhacutError):
    """A plan that contradicts itself or the model it is meant for."""


class BudgetError(MhacutError):
    """A budget that cannot be reached, or that the model already meets."""


class DataError(MhacutError):
    """Images or labels that are missing, unreadable, or do not fit the model."""


class OutputError(MhacutError):
    """A file that cannot or must not be written."""


class Interrupted(MhacutError):
    """Asked to stop, and stopped with all saved: the command line exits 130."""


class FailedElsewhere(MhacutError):
    """Another process of the run failed and says why; this one only ends."""
