"""Fuzz the readers of files, guided by coverage.

    pip install atheris
    python examples/robustness/fuzz.py header|torch|pickle|record|yaml CORPUS -max_total_time=600

An input may be read, or refused by an error of mhacut; anything else is a crash, which libFuzzer keeps. So is
one that takes longer than ``-timeout`` (seconds) or more than ``-rss_limit_mb``.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

import atheris
import timm  # noqa: F401
import torch

with atheris.instrument_imports(include=["mhacut", "torch._weights_only_unpickler", "yaml"]):
    import yaml  # noqa: F401

    importlib.reload(torch._weights_only_unpickler)  # all of torch would take minutes

    from mhacut.checkpoint import files, record, torch_file, training, yacs  # noqa: F401
    from mhacut.errors import MhacutError
    from mhacut.options.config import read_config
    from mhacut.options.finetune import FinetuneOptions

FILE = Path(tempfile.mkdtemp()) / "input"


def header(data: bytes) -> None:
    """A safetensors header, with its length in front, and as many bytes behind as it asks for at most."""
    content = len(data).to_bytes(8, "little") + data
    _read(content + bytes(min(len(data), 64)))
    _read(data)


def pickle(data: bytes) -> None:
    """The pickle in a zip file of torch."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("m/data.pkl", data)
        archive.writestr("m/version", b"3\n")
        archive.writestr("m/data/0", bytes(64))
    _read(buffer.getvalue())


def whole(data: bytes) -> None:
    """The bytes of a file."""
    _read(data)


def slim(data: bytes) -> None:
    """The document of a slim file."""
    found = record.SlimRecord.from_json(data.decode(errors="replace"))
    assert record.SlimRecord.from_json(found.to_json()) == found


def options(data: bytes) -> None:
    """A file of options."""
    FILE.write_bytes(data)
    read_config(FILE, FinetuneOptions.options(), "run.yaml")


def _read(content: bytes) -> None:
    FILE.write_bytes(content)
    with suppress(MhacutError):
        found = files.read_file_header(FILE)
        training.read_training(found.training)
        assert files.read_tensors(found).keys() == found.tensors.keys()


TARGETS = {"header": header, "torch": whole, "pickle": pickle, "record": slim, "yaml": options}


def seeds(target: str, corpus: Path) -> None:
    """Put inputs that are read into an empty corpus."""
    corpus.mkdir(parents=True, exist_ok=True)
    if any(corpus.iterdir()):
        return
    state = {"state_dict": {"a.weight": torch.ones(2, 3), "b.bias": torch.ones(2).half()}, "epoch": 3}
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
        if target == "torch":
            (corpus / f"torch{zipped}").write_bytes(buffer.getvalue())
        elif target == "pickle" and zipped:
            with zipfile.ZipFile(buffer) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                (corpus / "pickle").write_bytes(archive.read(name))
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    if target == "header":
        (corpus / "one").write_text(json.dumps({"a": entry, "__metadata__": {"mhacut": "{}"}}))
    if target == "yaml":
        (corpus / "one").write_text("lr: 1e-3\nteacher-model-arg: {depth: 2}\nscale: &a [0.5, 1]\nmean: *a\n")
    if target == "record":
        unit = {"layer": "blocks.0.mlp", "kind": "hidden", "dense_width": 8, "kept": [[0, 5, 7]]}
        sizes = {"input_size": [3, 32, 32], "mean": [0.5], "std": [0.5], "interpolation": "bicubic"}
        document = {"format_version": 1, "architecture": "vit_tiny_patch16_224", "model_args": {"depth": 2}}
        document |= {"pretrained_cfg": {}, "plan": [unit], "layers": {"blocks.0.mlp": {"hidden_width": 3}}}
        document |= {"basis": "channel", "preprocessing": {**sizes, "crop_pct": 0.9, "crop_mode": "center"}}
        (corpus / "one").write_text(json.dumps({**document, "history": [{"command": "prune"}]}))


def main() -> None:
    """Run the fuzzer on one of the targets."""
    target, corpus, *flags = sys.argv[1:]
    seeds(target, Path(corpus))
    run = TARGETS[target]

    def test_one(data: bytes) -> None:
        with suppress(MhacutError):
            run(data)

    os.chdir(FILE.parent)
    atheris.Setup([sys.argv[0], str(Path(corpus).resolve()), *flags], test_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
