"""Two processes that write one output at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.cli import FAST, run
from helpers.files import ModelFile, cut_into_file
from helpers.models import ModelCase
from helpers.plans import random_plan
from helpers.programs import MAIN
from mhacut.commands import prune as prune_command
from mhacut.runtime.files import write_whole_folder
from mhacut.surgery.find import find_prunable_layers

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
together(*{{"file": (files, "_publish"), "folder": (os, "rename"), "run": (RunFolder, "open_new")}}[place])
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


def replaced(path: Path, tiny_vit: ModelFile, other: str) -> None:
    """Do what another process might do to the file ``path``: replace it by a model's, or by none."""
    path.unlink()
    if other == "garbage":
        path.write_bytes(b"garbage")
        return
    args = {**tiny_vit.args, **({"img_size": 64} if other == "other size" else {})}
    case = ModelCase(tiny_vit.architecture, {**args, "num_classes": 5 if other == "other classes" else 7})
    model = case.create().eval()
    cut_into_file(model, random_plan(find_prunable_layers(model), seed=0)[0], path, case)


TO_FLOPS, TO_PARAMETERS = ("--flops", "60%"), ("--params", "60%")
"""Budgets of a file that is written once, and of one that is written again after the measurement."""


@pytest.mark.parametrize(
    ("other", "flags"),
    [
        *((other, TO_FLOPS) for other in ("same shape", "other classes", "garbage")),
        ("same shape", TO_PARAMETERS),
        ("same shape", (*TO_PARAMETERS, "--overwrite")),
        ("other size", (*TO_FLOPS, "--overwrite")),
    ],
)
@pytest.mark.slow
def test_a_file_that_another_process_changes_is_left_to_it(tiny_vit, tmp_path, monkeypatch, other, flags):
    """With another model in it, even one that takes other images."""
    target, original, left = tmp_path / "slim.safetensors", prune_command.measure, []

    def late(*args):
        replaced(target, tiny_vit, other)
        left.append(contents(tmp_path))
        return original(*args)

    monkeypatch.setattr(prune_command, "measure", late)
    result = run("prune", *tiny_vit.flags, *FAST, *flags, "-o", target)
    error = f"error: {target}: was replaced by another process meanwhile; choose another name"
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, error)
    assert contents(tmp_path) == left[0]


@pytest.mark.parametrize("flags", [TO_FLOPS, TO_PARAMETERS])
@pytest.mark.slow
def test_a_file_that_is_removed_is_written_again(tiny_vit, tmp_path, monkeypatch, flags):
    command = ["prune", *tiny_vit.flags, *FAST, *flags, "-o"]
    assert run(*command, tmp_path / "kept" / "slim.safetensors").exit_code == 0
    target, original = tmp_path / "removed" / "slim.safetensors", prune_command.measure

    def late(*args):
        target.unlink()
        return original(*args)

    monkeypatch.setattr(prune_command, "measure", late)
    assert run(*command, target).exit_code == 0
    assert contents(target.parent) == contents(tmp_path / "kept")


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
        write_whole_folder(tmp_path / "model", lambda other: fill(other, "early"))

    write_whole_folder(tmp_path / "model", late)
    assert {file.name: file.read_text() for file in (tmp_path / "model").iterdir()} == {
        "config.json": "late",
        "model.safetensors": "late",
    }
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.exhaustive
def test_two_that_export_leave_one_whole_folder(programs, slim, tmp_path):
    command = ["export", slim, "--format", "timm", "-o"]
    assert programs.run(MAIN, *command, tmp_path / "alone" / "folder").returncode == 0
    codes, said = pair(programs, "folder", ("a", "b"), *command, tmp_path / "both" / "folder")
    assert codes == [0, 1]
    assert f"{tmp_path / 'both' / 'folder'}: cannot be written: Directory not empty" in said
    assert [path.name for path in (tmp_path / "both").iterdir()] == ["folder"]
    assert contents(tmp_path / "both" / "folder") == contents(tmp_path / "alone" / "folder")


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
