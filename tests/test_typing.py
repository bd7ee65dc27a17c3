"""The public API as type checkers and editors see it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from torch import nn

import mhacut
from mhacut.options.generate import KEYWORDS, keywords_module

HERE = Path(__file__).parent


def python_blocks(path: Path) -> list[str]:
    """Return the blocks of Python in a page of Markdown."""
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def test_good_calls_and_the_readme_pass_mypy_strict_and_mistakes_do_not(tmp_path):
    pytest.importorskip("mypy")
    config, examples = HERE / "typing" / "mypy.ini", HERE / "typing" / "examples.py"
    blocks = python_blocks(HERE.parent / "README.md")
    assert len(blocks) >= 4
    readme = tmp_path / "readme.py"
    readme.write_text("\n".join(blocks))  # later blocks use names of earlier ones
    command = [sys.executable, "-m", "mypy", "--config-file", config, "--cache-dir", os.devnull]
    command += [examples, readme]
    result = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_keywords_are_generated_from_the_options():
    assert KEYWORDS.read_text() == keywords_module(), "run python -m mhacut.options.generate"


def test_every_public_name_is_there():
    assert all(getattr(mhacut, name) is not None for name in mhacut.__all__)
    assert set(mhacut.__all__) <= set(dir(mhacut))
    assert (Path(mhacut.__file__).parent / "py.typed").exists()


def test_the_output_of_a_dry_run_is_refused():
    with pytest.raises(mhacut.CheckpointError, match="a dry run of prune writes none"):
        mhacut.load_model(None)
    with pytest.raises(mhacut.CheckpointError, match="a dry run of prune writes none"):
        mhacut.save_model(nn.Linear(1, 1), "x.safetensors", like=None)


def test_keywords_resolve_at_run_time():
    from mhacut.options.keywords import PruneKeywords

    assert typing.get_type_hints(PruneKeywords)["round_to"] is int
