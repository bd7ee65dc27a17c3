"""Seeds that depend on the place in a run, and the state of all random generators."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mixed_seed(*numbers: int) -> int:
    """Return a seed in 0..2**63 - 1 that depends on every number and on their order.

    >>> mixed_seed(42, 0, 1) == mixed_seed(42, 0, 1), mixed_seed(42, 0, 1) == mixed_seed(42, 1, 0)
    (True, False)
    """
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, numpy and, on the CPU, torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random generators of Python, numpy and torch, GPUs included, when the context ends."""
    python, numpy, generator = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(generator)
