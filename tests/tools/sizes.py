"""Peak memory and time of mhacut with many images, with broken images, and with many classes.

    python tests/tools/sizes.py images --counts 1000 100000
    python tests/tools/sizes.py corrupt
    python tests/tools/sizes.py classes --counts 1000 21841

``images`` links one small JPEG so often, into 1,000 class folders, and prunes and fine-tunes a model of two
blocks with them. ``corrupt`` breaks 1 % of 2,000 images (cut short, empty, or text) and sees that both
commands finish and count them. ``classes`` prunes vit_tiny_patch16_224 at random weights with heads of so
many classes, and the model of two blocks on 4,096 synthetic images.

Prints a line of JSON for each command; memory is the resident set of its largest process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}
CLASSES = 1000
DENSE = """
import json, sys, timm, torch
from safetensors.torch import save_file
torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", **json.loads(sys.argv[2]))
save_file(model.state_dict(), sys.argv[1])
"""
"""In a process of its own: a child's peak memory is counted from that of the process that starts it."""
PRUNE = ["prune", "--model", "vit_tiny_patch16_224", "--effort", "fast", "--no-latency", "--flops"]
FINETUNE = ["finetune", "-b", "64", "-j", "0"]


def main() -> None:
    """Run one of the three."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=["images", "corrupt", "classes"])
    parser.add_argument("--counts", nargs="+", type=int, default=[1000], help="images, or classes")
    parser.add_argument("--seed", type=int, default=0, help="which images break, and how")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mhacut-sizes-") as folder:
        if arguments.what == "images":
            images(Path(folder), arguments.counts)
        elif arguments.what == "corrupt":
            corrupt(Path(folder), random.Random(arguments.seed))
        else:
            classes(Path(folder), arguments.counts)


def images(folder: Path, counts: Sequence[int]) -> None:
    """Prune and fine-tune with so many images."""
    file = dense(folder, SMALL | {"num_classes": CLASSES})
    for count in counts:
        place = folder / str(count)
        paint(place / "data" / "train", count)
        data = ["--data-dir", place / "data"]
        slim = place / "slim.safetensors"
        show(count, measured([*PRUNE, "50%", file, *small_model(), *data, "-o", slim])[0])
        steps = [*FINETUNE, slim, *data, "--steps", "1", "-o", place / "run"]
        show(count, measured(steps)[0])


def corrupt(folder: Path, generator: random.Random, count: int = 2000) -> None:
    """Break 1 % of the images; both commands must finish, and count those that they met."""
    file = dense(folder, SMALL | {"num_classes": CLASSES})
    paint(folder / "data" / "train", count)
    broken = generator.sample(sorted((folder / "data").rglob("*.jpg")), count // 100)
    for number, path in enumerate(broken):
        content = path.read_bytes()
        path.unlink()  # a link: the others stay whole
        cut = content[: generator.randrange(1, len(content) // 2)]
        path.write_bytes([cut, b"", b"not found\n"][number % 3])
    data, slim = ["--data-dir", folder / "data"], folder / "slim.safetensors"
    command = [*PRUNE, "50%", file, *small_model(), *data, "--calibration-images", str(count), "-o", slim]
    spent, document = measured(command)
    assert f"{len(broken)} unreadable left out" in document["data"], document["data"]
    show(document["data"], spent)
    spent, document = measured([*FINETUNE, slim, *data, "--epochs", "1", "-o", folder / "run"])
    found = {Path(name) for name in document["unreadable"]}
    assert found <= set(broken), found
    assert len(found) > len(broken) // 2, found  # the last, incomplete batch of the epoch is left out
    show(f"{len(found)} unreadable, replaced by others", spent)


def classes(folder: Path, counts: Sequence[int]) -> None:
    """Prune both models with so many classes, the small one on many images, whose logits are kept."""
    for count in counts:
        file = dense(folder, {"num_classes": count})
        show(count, measured([*PRUNE, "50%", file, "-o", folder / f"slim{count}.safetensors"])[0])
        file = dense(folder, SMALL | {"num_classes": count})
        small = [file, *small_model(), "--calibration-images", "4096"]
        spent = measured([*PRUNE, "75%", *small, "-o", folder / f"small{count}.safetensors"])[0]
        show(f"{count}, small model, 4,096 images", spent)


def dense(folder: Path, arguments: dict[str, int]) -> Path:
    """Write vit_tiny_patch16_224 at random weights."""
    path = folder / f"dense{arguments['num_classes']}.safetensors"
    subprocess.run([sys.executable, "-c", DENSE, path, json.dumps(arguments)], check=True)
    return path


def small_model() -> list[str]:
    """Return the flags of the model of two blocks."""
    return [word for name, value in SMALL.items() for word in ("--model-arg", f"{name}={value}")]


def paint(folder: Path, count: int) -> None:
    """Make so many names of one JPEG, over all classes."""
    folder.mkdir(parents=True)
    source = folder.parent / "one"
    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(source, format="JPEG")
    for label in range(CLASSES):
        (folder / f"c{label:04}").mkdir()
    for number in range(count):
        # A file can have 65,000 names on ext4.
        if number % 50_000 == 49_999:
            source = Path(f"{source}+")
            source.write_bytes((folder.parent / "one").read_bytes())
        os.link(source, folder / f"c{number % CLASSES:04}" / f"{number:06}.jpg")


def measured(arguments: Sequence[object]) -> tuple[dict[str, object], dict[str, object]]:
    """Run a command; return its time and memory, and what it printed as JSON."""
    command = [sys.executable, "-m", "mhacut", *map(str, arguments), "--json", "-q"]
    began = time.perf_counter()
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(command, stdout=printed)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        printed.seek(0)
        document = printed.read()
    if status:
        sys.exit(f"{' '.join(command)}: ended with {os.waitstatus_to_exitcode(status)}")
    spent = {
        "command": command[3],
        "seconds": round(seconds, 1),
        "CPU seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak, MiB": usage.ru_maxrss // 1024,
    }
    return spent, json.loads(document)


def show(what: object, spent: dict[str, object]) -> None:
    """Print one line."""
    print(json.dumps({"of": what, **spent}), flush=True)


if __name__ == "__main__":
    main()
