"""Write the table of fingerprints for the timm that is installed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import timm

from mhacut.checkpoint.build import shapes_of
from mhacut.checkpoint.fingerprints import TABLE, fingerprint
from mhacut.commands.models import architectures, build_weightless, entry_of


def write_table(timm: str, fingerprints: Mapping[str, tuple[str, str]]) -> str:
    """Return the text of a table, from the fingerprint of each architecture.

    A line without indent begins a group with its digest. Below it, each line has a digest of all names and
    shapes and the architectures that share it.
    """
    groups: dict[str, dict[str, list[str]]] = {}
    for name, (exact, any_size) in sorted(fingerprints.items()):
        groups.setdefault(any_size, {}).setdefault(exact, []).append(name)
    lines = [f"timm {timm}"]
    for any_size, by_exact in groups.items():
        lines.append(any_size)
        lines += [" " + " ".join([exact, *names]) for exact, names in by_exact.items()]
    return "\n".join(lines) + "\n"


def prunable_fingerprints(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    fingerprints = {}
    for name in names:
        model = build_weightless(name)
        entry = entry_of(name, model, ())
        if entry.transformer and entry.refusal is None:
            fingerprints[name] = fingerprint(shapes_of(model))
    return fingerprints


if __name__ == "__main__":
    TABLE.write_text(write_table(timm.__version__, prunable_fingerprints(architectures())), encoding="ascii")
