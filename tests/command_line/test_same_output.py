"""Two processes that write one output at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.cli import FAST
from helpers.programs import MAIN
from mhacut.runtime.files import fill_folder

PAIR = f"""
import multiprocessing, os, sys
from mhacut.finetuning.folder import RunFolder
from mhacut.runtime import files

both = multiprocessing.get_context("fork").Barrier(2)

def together(owner, name):
    original, met = getattr(owner, name), []

    def late(*args, **options):
        if not met:
            met.append(both.wait(60))
        return original(*args, **options)

    setattr(owner, name, late)

place, first, second = sys.argv[1:4]
together(*{{"file": (files, "sync"), "run": (RunFolder, "lock")}}[place])
running = []
for own in (first, second):
    pid = os.fork()
    if not pid:
        sys.argv[1:] = [word.replace("OWN", own) for word in sys.argv[4:]]
        {MAIN}
    running.append(pid)
print("codes", *(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in running))
"""
"""Runs the command twice, with two values of OWN; both wait for each other before they publish the output."""


def contents(path: Path) -> dict[str, bytes]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


def pair(programs, place: str, own: tuple[str, str], *command: object) -> tuple[list[int], str]:
    """Exit codes of both, and what they said."""
    done = programs.run(PAIR, place, *own, *command)
    codes = next(line for line in done.stdout.splitlines() if line.startswith("codes "))
    assert "Traceback" not in done.stderr
    return sorted(map(int, codes.split()[1:])), done.stderr


@pytest.mark.slow
def test_two_that_prune_leave_one_whole_file(programs, tiny_vit, tmp_path):
    command = ["prune", *tiny_vit.flags, *FAST, "--flops", "OWN", "-o"]
    budgets, whole = ("60%", "70%"), []
    for own in budgets:
        alone = tmp_path / "alone" / own / "slim.safetensors"
        words = [own if word == "OWN" else word for word in command]
        assert programs.run(MAIN, *words, alone).returncode == 0
        whole.append(contents(alone))
    target = tmp_path / "both" / "slim.safetensors"
    codes, said = pair(programs, "file", budgets, *command, target)
    assert codes == [0, 1], said
    assert f"{target}: was created by someone else meanwhile; choose another name" in said
    assert contents(target.parent) in whole


def test_a_folder_that_another_writes_meanwhile_is_one_whole_folder(tmp_path):
    def fill(folder: Path, content: str) -> None:
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_text(content)

    def late(folder: Path) -> None:
        fill(folder, "late")
        fill_folder(tmp_path / "model", lambda other: fill(other, "early"))

    fill_folder(tmp_path / "model", late)
    assert {file.name: file.read_text() for file in (tmp_path / "model").iterdir()} == {
        "config.json": "late",
        "model.safetensors": "late",
    }
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "overwrite",
    [
        pytest.param(False, marks=pytest.mark.slow, id="new"),
        pytest.param(True, marks=pytest.mark.exhaustive, id="overwrite"),
    ],
)
def test_of_two_that_finetune_one_is_refused(programs, slim, images, tmp_path, overwrite):
    command = ["finetune", slim, "--data-dir", images, "--train-split", "val", "-b", "7", "-j", "0"]
    command += ["--epochs", "OWN", "-o", tmp_path / "run", *["--overwrite"] * overwrite]
    codes, said = pair(programs, "run", ("20", "30"), *command)  # longer than one waits for the other
    assert codes == [0, 1]
    assert f"{tmp_path / 'run'}: another process is writing a run there; wait" in said
    files = {"args.yaml", "best.safetensors", "last.safetensors", "state.pt", "summary.csv"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == files
    epochs = len((tmp_path / "run" / "summary.csv").read_text().splitlines()) - 1
    assert f"epochs: {epochs}" in (tmp_path / "run" / "args.yaml").read_text()
    again = programs.run(MAIN, "finetune", "--resume", tmp_path / "run")
    assert (again.returncode, "nothing left to train" in again.stderr) == (0, True)
