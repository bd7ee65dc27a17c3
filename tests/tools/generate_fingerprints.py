"""Write the table of fingerprints for the timm that is installed."""

from __future__ import annotations

from collections.abc import Iterable

import timm

from mhacut.checkpoint.build import shapes_of
from mhacut.checkpoint.fingerprints import TABLE, Fingerprint, fingerprint, write_table
from mhacut.commands.models import architectures, build_weightless, entry_of


def prunable_fingerprints(names: Iterable[str]) -> dict[str, Fingerprint]:
    """Return the fingerprint of each of these architectures of timm in which something can be cut."""
    fingerprints = {}
    for name in names:
        model = build_weightless(name)
        entry = entry_of(name, model, ())
        if entry.transformer and entry.refusal is None:
            fingerprints[name] = fingerprint(shapes_of(model))
    return fingerprints


if __name__ == "__main__":
    TABLE.write_text(write_table(timm.__version__, prunable_fingerprints(architectures())), encoding="ascii")
