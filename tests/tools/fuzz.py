"""Fuzz the readers of files, guided by coverage.

    pip install atheris
    python tests/tools/fuzz.py TARGET CORPUS -max_total_time=600

The targets are header, torch, pickle, yacs, record, yaml, state and calibration. An input may be read, or
refused by an error of mhacut; anything else is a crash, which libFuzzer keeps. So is one that takes longer
than ``-timeout`` (seconds) or more than ``-rss_limit_mb``.
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
from functools import cache
from pathlib import Path
from types import ModuleType

import atheris
import timm
import torch

with atheris.instrument_imports(include=["mhacut", "torch._weights_only_unpickler", "yaml"]):
    import yaml  # noqa: F401

    importlib.reload(torch._weights_only_unpickler)  # all of torch would take minutes

    from mhacut.checkpoint import files, record, torch_file, training  # noqa: F401
    from mhacut.commands import prune_calibration
    from mhacut.errors import MhacutError
    from mhacut.finetuning import folder
    from mhacut.options.finetune import FinetuneOptions
    from mhacut.options.option import read_config
    from mhacut.options.prune import SearchOptions
    from mhacut.pruning.job import Job
    from mhacut.surgery.find import find_prunable_layers

FILE = Path(tempfile.mkdtemp()) / "input"
INPUTS = {"slim file": "0" * 64}
"""Inputs of a run, or a fingerprint."""


def header(data: bytes) -> None:
    """A safetensors header, with its length in front, and as many bytes behind as it asks for at most."""
    content = len(data).to_bytes(8, "little") + data
    with suppress(MhacutError):
        _read(data)
    _read(content + bytes(min(len(data), 64)))


def pickle(data: bytes) -> None:
    """The pickle in a zip file of torch."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("m/data.pkl", data)
        archive.writestr("m/version", b"3\n")
        for number, size in enumerate((24, 4)):  # as the seeds store them
            archive.writestr(f"m/data/{number}", bytes(size))
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
    found = files.read_file_header(FILE)
    training.read_training(found.training)
    assert files.read_tensors(found).keys() == found.tensors.keys()


def state(data: bytes) -> None:
    """The state that a run of fine-tuning is resumed from."""
    of_run = folder.RunFolder(FILE.parent)
    of_run.file(folder.STATE).write_bytes(data)
    assert of_run.read_state() is not None


def calibration(data: bytes) -> None:
    """A file that keeps the calibration of a small model."""
    FILE.write_bytes(data)
    found = prune_calibration.read_calibration(FILE, INPUTS, _job())
    prune_calibration.check_run(FILE, found, _job())


@cache
def _job() -> Job:
    sizes = {"img_size": 32, "depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval().requires_grad_(False)
    prunable, images = find_prunable_layers(model), torch.zeros(3, 3, 32, 32)
    return Job(model, prunable, prunable.units(), None, images, SearchOptions())


TARGETS = {
    "header": header,
    "torch": whole,
    "pickle": pickle,
    "yacs": pickle,
    "record": slim,
    "yaml": options,
    "state": state,
    "calibration": calibration,
}


def seeds(target: str, corpus: Path) -> None:
    """Put inputs that are read into an empty corpus."""
    corpus.mkdir(parents=True, exist_ok=True)
    if any(corpus.iterdir()):
        return
    weights = {"a.weight": torch.ones(2, 3), "b.bias": torch.ones(2).half()}
    saved: dict[str, object] = {"state_dict": weights, "epoch": 3}
    if target == "yacs":
        saved = {"model": weights, "config": _configuration()}
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save(saved, buffer, _use_new_zipfile_serialization=zipped)
        if target == "torch":
            (corpus / f"torch{zipped}").write_bytes(buffer.getvalue())
        elif target in ("pickle", "yacs") and zipped:
            with zipfile.ZipFile(buffer) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                (corpus / "pickle").write_bytes(archive.read(name))
    entry = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
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
    if target == "state":
        _save_state(corpus / "one")
    if target == "calibration":
        prune_calibration.write_calibration(corpus / "one", _job().calibrate(), INPUTS)


def _configuration() -> dict[str, object]:
    """A configuration that is pickled as one of yacs."""

    class CfgNode(dict[str, object]):
        pass

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    sys.modules["yacs.config"] = ModuleType("yacs.config")
    sys.modules["yacs.config"].CfgNode = CfgNode  # type: ignore[attr-defined]
    made = CfgNode(DEPTHS=[2, 2])
    made.__dict__["__deprecated_keys__"] = {"A"}
    return CfgNode(MODEL=made)


def _save_state(path: Path) -> None:
    trainer = {"model": torch.nn.Linear(3, 2).state_dict(), "average": None}
    progress = {"step": 3, "best": None, "epoch_loss": 1.5, "rows": [], "unreadable": {"a.png": None}}
    torch.save({"version": 2, "trainer": trainer, "progress": progress, "began_with": INPUTS}, path)


def main() -> None:
    """Run the fuzzer on one of the targets."""
    target, corpus, *flags = sys.argv[1:]
    corpus = str(Path(corpus).resolve())
    seeds(target, Path(corpus))
    run = TARGETS[target]

    def test_one(data: bytes) -> None:
        with suppress(MhacutError):
            run(data)

    os.chdir(FILE.parent)
    atheris.Setup([sys.argv[0], corpus, *flags], test_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
