"""Outputs of the dense model's blocks, kept from one slim model to the next."""

from __future__ import annotations

from torch import Tensor

MOST_BYTES = 2**31
"""Bounds the memory of all that is kept; outputs that need more are computed again."""


class KeptOutputs:
    """Outputs of the blocks of one job's dense model on its images, in the same batches.

    They are the same for every slim model that merges no tokens: several budgets, and a search within a bound
    on the loss, compute them once.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self._sizes: tuple[int, ...] = ()
        self._outputs: dict[str, list[Tensor]] = {}

    def of_batches(self, sizes: tuple[int, ...], nbytes: int) -> dict[str, list[Tensor]] | None:
        """Return the outputs kept so far, one per batch, by block; what is added to them is kept.

        Outputs of batches of other sizes are dropped.

        Args:
            sizes: images in each batch.
            nbytes: memory that the outputs of all blocks need.

        Returns:
            None if that is above :data:`MOST_BYTES`.
        """
        if nbytes > MOST_BYTES:
            return None
        if sizes != self._sizes:
            self._sizes, self._outputs = sizes, {}
        return self._outputs
