"""What is printed: hostile text made harmless, progress, errors that nobody foresaw."""

from __future__ import annotations

import json
import logging
import os
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.cli import run, succeed
from helpers.pruning import stated_by
from helpers.terminals import terminal
from mhacut.cli.running import Console
from mhacut.text import safe

HOSTILE = "x\x1b[2J\x1b]0;title\x07[red]\u202e\x9b\r"


def test_safe_shows_what_terminals_obey():
    assert safe(HOSTILE) == r"x\x1b[2J\x1b]0;title\x07[red]\u202e\x9b\r"
    assert safe("h\u00e9 \u6f22 [b]") == "h\u00e9 \u6f22 [b]"
    assert safe(os.fsdecode(b"\xff.pth")) == r"\udcff.pth"


def test_a_warning_in_a_result_has_a_colour_on_terminals(monkeypatch):
    for as_json, colour in ((False, "\x1b[1;33mwarning: large loss\x1b[0m\n[red]\n"), (True, "{")):
        with terminal(monkeypatch, "stdout") as screen:
            Console(as_json=as_json).result("warning: large loss\n[red]", {})
        assert screen.getvalue().startswith(colour)


def assert_harmless(text):
    assert all(char == "\n" or char.isprintable() for char in text), repr(text)


def test_hostile_history(slim, tmp_path):
    document = stated_by(slim)
    document["history"] = [
        {"command": HOSTILE, "budget": HOSTILE, "flops_before": True, "versions": 3, "data": [HOSTILE]}
    ]
    path = tmp_path / "slim.safetensors"
    save_file(load_file(slim), path, {"format": "pt", "mhacut": json.dumps(document)})
    result = succeed("inspect", path)
    assert_harmless(result.stdout + result.stderr)
    assert r"step 1: x\x1b[2J" in result.stdout
    assert "? -> ? FLOPs (budget ?)" in result.stdout


def test_progress_on_a_terminal(monkeypatch):
    with terminal(monkeypatch) as stream:
        console = Console()
        console.start("searching")
        console.advance(3, 10, "loss [bold] 1\x1b[2J")
        console.log("a note with [brackets] and \x1b[2J")
        console.finish()
    text = stream.getvalue()
    assert "searching" in text
    assert r"a note with [brackets] and \x1b[2J" in text
    assert "\x1b[2J" not in text


def test_seconds_of_stages_are_shown_with_v(capsys):
    for settings, shown in (({}, False), ({"verbose": 1}, True), ({"verbose": 1, "quiet": True}, False)):
        console = Console(as_json=True, **settings)
        console.start("reading")
        console.start("evaluating")
        console.result("", {"command": "x"})
        printed = capsys.readouterr()
        assert list(json.loads(printed.out)["stage_seconds"]) == ["reading", "evaluating"]
        assert ("all stages" in printed.err) == shown


def test_unforeseen_errors_ask_for_a_report(instead_of_prune):
    def fail(options):
        raise ZeroDivisionError("[red] \x1b[2J")

    instead_of_prune(fail)
    result = run("prune", __file__, "--flops", "1G")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "Please report it" in result.stderr
    assert_harmless(result.stderr)


def test_own_errors_show_a_traceback_on_demand(captured):
    assert "Traceback" not in run("prune", "a", "--flops", "1G").stderr
    result = run("prune", "a", "--flops", "1G", env={"MHACUT_DEBUG": "1"})
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("error: far enough\n")
    assert result.exit_code == 1


def test_out_of_memory_says_what_to_do(instead_of_prune):
    for fail in (lambda _: torch.empty(2**60, dtype=torch.uint8), raise_out_of_memory):
        instead_of_prune(fail)
        result = run("prune", __file__, "--flops", "1G")
        assert result.exit_code == 1
        assert result.stderr == "error: out of memory; use a smaller --batch-size, or --device cpu\n"


def raise_out_of_memory(options):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_libraries_are_shown_with_v_only(instead_of_prune):
    def speak(options):
        warnings.warn("loud warning", stacklevel=1)
        logging.getLogger("timm.data").warning("loud log")

    instead_of_prune(speak)
    assert run("prune", __file__, "--flops", "1G").stderr == "error: far enough\n"
    with pytest.warns(UserWarning, match="loud warning"):
        assert "timm.data: loud log" in run("prune", __file__, "--flops", "1G", "-v").stderr
