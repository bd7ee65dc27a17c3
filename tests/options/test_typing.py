"""The public API as type checkers and editors see it."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from torch import nn

import mhacut
from helpers.docs import PAGES, blocks
from mhacut.options.measure import BenchKeywords, BenchOptions

HERE = Path(__file__).parents[1]


@pytest.mark.slow
def test_good_calls_and_the_documentation_pass_mypy_strict_and_mistakes_do_not(tmp_path):
    pytest.importorskip("mypy")
    config, examples = HERE / "typing" / "mypy.ini", HERE / "typing" / "examples.py"
    pages = []
    for page in PAGES:
        written = "\n".join(block.text for block in blocks(page) if block.language == "python" and block.runs)
        if written:
            pages.append(tmp_path / f"page_{page.stem.replace('-', '_').lower()}.py")
            pages[-1].write_text(written)  # later blocks use names of earlier ones
    assert len(pages) >= 6
    command = [sys.executable, "-m", "mypy", "--config-file", config, "--cache-dir", os.devnull]
    command += [examples, *pages]
    result = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_keywords_are_shown_with_type_default_and_help():
    for function in (mhacut.prune, mhacut.prune_many, mhacut.finetune, mhacut.evaluate, mhacut.inspect):
        shown = inspect.signature(function).parameters
        assert next(iter(shown)) == "checkpoint"
        assert {"batch_size", "device", "progress", "reporter"} <= set(shown)
        assert "    batch_size: Batch size" in (inspect.getdoc(function) or "")
    shown = inspect.signature(mhacut.prune).parameters
    assert (shown["steps"].annotation, shown["steps"].default) == ("int", 60)
    steps = (
        "    steps: Number of training steps of the learned importance of each channel (with method=paper)."
    )
    assert steps in (inspect.getdoc(mhacut.prune) or "")
    assert "    seconds: Seconds of measurement per batch size" in (inspect.getdoc(mhacut.bench) or "")


def test_keywords_of_bench_are_its_options():
    options = {name: one.type for name, one in BenchOptions.options().items() if name != "checkpoints"}
    assert typing.get_type_hints(BenchKeywords) == options


def test_every_public_name_is_there():
    assert all(getattr(mhacut, name) is not None for name in mhacut.__all__)
    assert set(dir(mhacut)) == set(mhacut.__all__)
    assert (Path(mhacut.__file__).parent / "py.typed").exists()


def test_the_output_of_a_dry_run_is_refused():
    with pytest.raises(mhacut.CheckpointError, match="dry run of prune writes no file"):
        mhacut.load_model(None)
    with pytest.raises(mhacut.CheckpointError, match="dry run of prune writes no file"):
        mhacut.save_model(nn.Linear(1, 1), "x.safetensors", like=None)
