"""Outputs of the dense model's blocks, kept from one slim model to the next."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

MOST_BYTES = 2**31
"""Bounds the memory of all that is kept; outputs that need more are computed again."""


@dataclass
class KeptOutputs:
    """Outputs of blocks of one model on the same images in the same batches.

    They are the same for every slim model that merges no tokens: several budgets, and a search within a bound
    on the loss, compute them once.
    """

    _sizes: tuple[int, ...] = ()
    """Images in each batch."""
    _outputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def on(self, sizes: tuple[int, ...], nbytes: int) -> dict[str, list[Tensor]] | None:
        """Return the outputs kept so far, one per batch, by block; what is added to them is kept.

        Args:
            sizes: images in each batch. Those of other batches are dropped.
            nbytes: memory that the outputs of all blocks need.

        Returns:
            None if that is above :data:`MOST_BYTES`.
        """
        if nbytes > MOST_BYTES:
            return None
        if sizes != self._sizes:
            self._sizes, self._outputs = sizes, {}
        return self._outputs
