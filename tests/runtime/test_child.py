"""Functions in processes of their own."""

from __future__ import annotations

import sys

import pytest

from mhacut.runtime.child import in_new_process


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


@pytest.mark.parametrize("body", ["raise SystemExit(3)", "pass", "print('no JSON')", "raise ValueError"])
def test_no_result_is_none(run, body):
    assert run(body) is None


@pytest.mark.parametrize("name", ["frozen", "executable"])
def test_an_application_is_not_started_again(run, monkeypatch, name):
    monkeypatch.setattr(sys, name, {"frozen": True, "executable": ""}[name], raising=False)
    assert run("print(1)") is None
