"""Functions in new processes, and workers that read images."""

from __future__ import annotations

import pytest

from mhacut.runtime.process import in_new_process


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call a function ``f`` of the given lines in a new process; the working directory has a ``json.py``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "modules")  # a search path of this process alone
    (tmp_path / "modules").mkdir()
    (tmp_path / "json.py").write_text("raise SystemExit('the working directory comes first')")

    def run(body, job=None):
        (tmp_path / "modules" / "named.py").write_text(f"def f():\n    {body}\n")
        return in_new_process("named", "f", job)

    return run


def test_the_last_line_is_the_result(run):
    body = "import json, sys; job = json.load(sys.stdin); print('noise'); print(json.dumps(job['a'] + 1))"
    assert run(body, {"a": 41}) == 42


@pytest.mark.parametrize("body", ["raise SystemExit(3)", "pass", "print('no JSON')"])
def test_no_result_is_none(run, body):
    assert run(body) is None


READING = """
from mhacut.data import EvaluationLoader

class Images(list):
    def __getitem__(self, index):
        {then}
        return super().__getitem__(index)

images = Images((__import__("torch").zeros(3, 2, 2), 0) for _ in range(100))
loader = EvaluationLoader(
    images, total=100, batch_size=2, workers=1, num_classes=1, description=""
)
batches = iter(loader)
next(batches)
"""


@pytest.mark.slow
def test_a_program_that_stops_reading_half_way_ends(programs):
    ended = programs.run(READING.format(then=""))
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_program_that_fails_where_images_are_read_ends(programs):
    failed = programs.run(READING.format(then="raise RuntimeError('no such image')"))
    assert failed.returncode == 1
    assert "no such image" in failed.stderr
