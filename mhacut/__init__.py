"""Cut channels out of the multi-head attention, and the MLP beside it, of trained vision transformers."""

from mhacut._version import __version__

__all__ = ["__version__"]
