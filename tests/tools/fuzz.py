"""Fuzz the readers of files, guided by coverage.

    pip install atheris
    python tests/tools/fuzz.py TARGET CORPUS -max_total_time=600

The targets are those of ``test_fuzz.py``, each with its inputs to begin with. An input may be read, or
refused by an error of mhacut; anything else is a crash, which libFuzzer keeps. So is one that takes longer
than ``-timeout`` (seconds) or more than ``-rss_limit_mb``.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from pathlib import Path

import atheris
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
with atheris.instrument_imports(include=["mhacut", "torch._weights_only_unpickler", "yaml"]):
    import yaml  # noqa: F401

    importlib.reload(torch._weights_only_unpickler)  # all of torch would take minutes
    from test_fuzz import TARGETS


def main() -> None:
    """Run the fuzzer on one of the targets."""
    target, place, *flags = sys.argv[1:]
    corpus, (run, seeds) = Path(place).resolve(), TARGETS[target]
    corpus.mkdir(parents=True, exist_ok=True)
    if not any(corpus.iterdir()):
        for number, seed in enumerate(seeds()):
            (corpus / f"seed{number}").write_bytes(seed)
    folder = Path(tempfile.mkdtemp())
    os.chdir(folder)
    atheris.Setup([sys.argv[0], str(corpus), *flags], lambda data: run(folder, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
