"""Two processes that write one run at the same time."""

from __future__ import annotations

import pytest

from helpers.programs import MAIN

PAIR = f"""
import multiprocessing, os, sys
from mhacut.finetuning.folder import RunFolder

both = multiprocessing.get_context("fork").Barrier(2)

def late(folder, lock=RunFolder.lock):
    both.wait(60)
    return lock(folder)

RunFolder.lock = late
first, second = sys.argv[1:3]
running = []
for own in (first, second):
    pid = os.fork()
    if not pid:
        sys.argv[1:] = [word.replace("OWN", own) for word in sys.argv[3:]]
        {MAIN}
    running.append(pid)
print("codes", *(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in running))
"""
"""Runs the command twice, with two values of OWN; both wait for each other before they lock the folder."""


def pair(programs, own: tuple[str, str], *command: object) -> tuple[list[int], str]:
    """Exit codes of both, and what they said."""
    done = programs.run(PAIR, *own, *command)
    codes = next(line for line in done.stdout.splitlines() if line.startswith("codes "))
    assert "Traceback" not in done.stderr
    return sorted(map(int, codes.split()[1:])), done.stderr


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
    codes, said = pair(programs, ("20", "30"), *command)  # longer than one waits for the other
    assert codes == [0, 1]
    assert f"{tmp_path / 'run'}: another process is writing a run there; wait" in said
    files = {"args.yaml", "best.safetensors", "last.safetensors", "state.pt", "summary.csv"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == files
    epochs = len((tmp_path / "run" / "summary.csv").read_text().splitlines()) - 1
    assert f"epochs: {epochs}" in (tmp_path / "run" / "args.yaml").read_text()
    again = programs.run(MAIN, "finetune", "--resume", tmp_path / "run")
    assert (again.returncode, "nothing left to train" in again.stderr) == (0, True)
