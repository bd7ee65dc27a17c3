"""Kill commands as they write, and see that every file is the old one or the new one, whole.

    python tests/tools/kill_runs.py --runs 100

Each command replaces a file that is there. Half of its runs are killed (SIGKILL) at any time, half within
the time that it spends writing. After each the target is compared with what the command writes when nothing
ends it, and with what was there before. After the last one the command runs once more, and must leave no
temporary file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from mhacut.checkpoint.files import read_file_header, read_tensors
from mhacut.cli.app import app
from mhacut.runtime import files

ARCHITECTURE = "vit_tiny_patch16_224"
ARGS = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}
MODEL = ["--model", ARCHITECTURE, *(x for k, v in ARGS.items() for x in ("--model-arg", f"{k}={v}"))]
FAST = ["--effort", "fast", "--calibration-images", "8", "--batch-size", "4", "--no-latency"]


@dataclass
class Command:
    """A command, and the file or folder that it writes."""

    name: str
    arguments: Sequence[str]
    target: Path
    whole: Callable[[Path], bool]
    """Whether a file that is neither the old nor the final one is whole: the command wrote it on its way."""
    old: dict[str, bytes] = field(default_factory=dict)
    new: dict[str, bytes] = field(default_factory=dict)

    def content(self) -> dict[str, bytes]:
        """Return the bytes of each file of the target, by name."""
        if self.target.is_dir():
            return {file.name: file.read_bytes() for file in self.target.iterdir() if file.is_file()}
        return {self.target.name: self.target.read_bytes()} if self.target.exists() else {}

    def put_back(self) -> None:
        """Let the target be what it was before the first run."""
        for name in self.content().keys() | self.old.keys():
            file = self.target / name if self.target.is_dir() else self.target
            if name in self.old:
                file.write_bytes(self.old[name])
            else:
                file.unlink()


def start(arguments: Sequence[str]) -> tuple[int, int]:
    """Run the command line in a fork; return its pid, and a pipe with a byte for each write that begins."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    code = 1
    try:
        os.close(reading)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        temporary_folder = files.temporary_folder

        @contextmanager
        def announced(target: Path) -> Iterator[Path]:
            os.write(writing, b"w")
            with temporary_folder(target) as folder:
                yield folder

        files.temporary_folder = announced
        app(list(arguments))
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        os._exit(code)


def run_to_the_end(command: Command) -> tuple[float, int]:
    """Return the seconds that it took, and the number of its writes."""
    began = time.monotonic()
    pid, pipe = start(command.arguments)
    writes = 0
    while data := os.read(pipe, 1024):
        writes += len(data)
    os.close(pipe)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code != 0:
        raise SystemExit(f"{command.name}: exit code {code} where nothing was killed: {command.arguments}")
    return time.monotonic() - began, writes


def kill_once(command: Command, seconds: float, writes: int, aimed: bool) -> bool:
    """Kill one run, ``aimed`` at one of its writes; return whether it had not yet ended by itself."""
    pid, pipe = start(command.arguments)
    if aimed:
        for _ in range(random.randint(1, writes)):
            if not select.select([pipe], [], [], 120)[0] or not os.read(pipe, 1):
                break
        time.sleep(random.expovariate(1 / 0.01))
    else:
        time.sleep(random.uniform(0, seconds))
    os.kill(pid, signal.SIGKILL)
    os.close(pipe)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def state_of(command: Command) -> str:
    """Return which of its files the command left: old, new, on the way, or broken."""
    found, states = command.content(), set()
    for name in command.old.keys() | command.new.keys() | found.keys():
        content = found.get(name)
        if content == command.old.get(name):
            states.add("old")
        elif content == command.new.get(name):
            states.add("new")
        elif content is not None:
            file = command.target / name if command.target.is_dir() else command.target
            states.add("on the way" if command.whole(file) else f"BROKEN {name}")
        else:
            states.add(f"GONE {name}")
    broken = [state for state in states if state.isupper() or state.split()[0].isupper()]
    return broken[0] if broken else " and ".join(sorted(states))


def temporaries(folder: Path) -> list[Path]:
    """Return what killed runs left under ``folder``."""
    return [path for path in folder.rglob(".*.tmp") if path.is_dir()]


def try_command(command: Command, runs: int) -> dict[str, object]:
    """Kill the command so many times; return what became of its files."""
    command.old = command.content()
    spent, writes = run_to_the_end(command)
    command.new = command.content()
    found: Counter[str] = Counter()
    left = killed = 0
    for number in range(runs):
        command.put_back()
        killed += kill_once(command, spent, writes, aimed=number % 2 == 1)
        found[state_of(command)] += 1
        left += bool(temporaries(command.target.parent))
    command.put_back()
    run_to_the_end(command)
    if command.content() != command.new:
        raise SystemExit(f"{command.name}: after kills it wrote something else")
    return {"runs": runs, "killed": killed, "files": dict(found), "left temporary files": left}


def slim_file(path: Path) -> bool:
    """Whether a slim file can be read to its end."""
    header = read_file_header(path)
    return set(read_tensors(header)) == set(header.tensors)


def never(path: Path) -> bool:
    """Whether a file is whole that has no business to be there."""
    return False


def commands(folder: Path) -> list[Command]:
    """Make inputs in ``folder``, and every command that writes there, over files that exist."""
    torch.manual_seed(0)
    model = timm.create_model(ARCHITECTURE, num_classes=4, **ARGS)
    dense = folder / "dense.safetensors"
    save_file(model.state_dict(), dense)
    generator = np.random.default_rng(0)
    for split, each in (("train", 6), ("val", 2)):
        for label in range(4):
            place = folder / "images" / split / f"c{label}"
            place.mkdir(parents=True)
            for number in range(each):
                pixels = generator.integers(0, 120, (32, 32, 3)) + 30 * label
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")
    slim, source = folder / "prune" / "slim.safetensors", folder / "slim.safetensors"
    prune = ["prune", str(dense), *MODEL, *FAST, "--overwrite"]
    run_to_the_end(Command("first", [*prune, "--flops", "70%", "-o", str(source)], source, slim_file))
    onnx, timm_folder, html = folder / "onnx" / "a.onnx", folder / "timm" / "out", folder / "html" / "a.html"
    for file in (
        onnx,
        html,
        *(timm_folder / name for name in ("model.safetensors", "config.json", "README.md")),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"old")
    slim.parent.mkdir()
    slim.write_bytes(source.read_bytes())
    data = ["--data-dir", str(folder / "images"), "-j", "0"]
    export = ["export", str(source), "--overwrite", "--format"]
    page = ["inspect", str(source), "--overwrite", "--html", str(html)]
    return [
        Command("prune", [*prune, "--flops", "60%", "-o", str(slim), *data], slim, slim_file),
        Command("export --format timm", [*export, "timm", "-o", str(timm_folder)], timm_folder, never),
        Command("export --format onnx", [*export, "onnx", "-o", str(onnx)], onnx, never),
        Command("inspect --html", page, html, never),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Try every command, print a line of JSON for each, and fail if a file was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="commands whose name begins with this")
    options = parser.parse_args(arguments)
    random.seed(options.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for command in commands(Path(folder)):
            if command.name.startswith(options.only):
                report = try_command(command, options.runs)
                print(json.dumps({"command": command.name, **report}), flush=True)
                if any(state.split()[0].isupper() for state in report["files"]):
                    sys.exit(f"{command.name}: a file was lost")


if __name__ == "__main__":
    main()
