"""The files of ``docs/changes`` become the changelog of the next release."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "changes"


def test_each_change_is_listed_under_its_heading():
    pytest.importorskip("towncrier", reason="needs pip install 'mhacut[dev]'")
    command = [sys.executable, "-m", "towncrier", "build", "--draft", "--version", "9.9"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    headings = {part.partition("\n")[0]: part for part in ran.stdout.split("### ")[1:]}
    for file in sorted(FOLDER.iterdir()):
        if file.name != "README.md":
            name, kind, end = file.name.rsplit(".", 2)
            assert name.startswith("+"), f"{file.name}: expected +NAME.added.md, .changed.md or .fixed.md"
            assert (kind, end) in {("added", "md"), ("changed", "md"), ("fixed", "md")}, file.name
            assert " ".join(file.read_text().split()) in " ".join(headings[kind.title()].split()), file.name


def test_the_changelog_has_a_place_for_it():
    assert (ROOT / "CHANGELOG.md").read_text().count("<!-- towncrier: a release is written below -->") == 1
