"""The parts of ``compare.py`` that run in processes of their own.

    python examples/benchmarks/compare_parts.py PART JOB.json

does one of :data:`PARTS`, and prints what it found as JSON.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods import METHODS
from process import OUT_OF_REACH
from scores import best_of, scores_of
from setups import evaluation_images, read, read_all, setup_of

if TYPE_CHECKING:
    from torch import Tensor

LATENCY_BATCH = 8
LATENCY_SECONDS = 4.0


def part_read(job: Mapping[str, Any]) -> int:
    """What every method does before it prunes."""
    read_all(setup_of(job))
    return 0


def part_prune(job: Mapping[str, Any]) -> int:
    """Prune with one of the modules in ``methods/``; write the slim model, print what was checked."""
    import torch
    from methods.common import OutOfReachError, Task, read_slim, write_slim

    method = METHODS[job["method"]]
    setup = setup_of(job)
    loaded, preprocessing, seen = read_all(setup)
    dense = loaded.model.eval().requires_grad_(False)
    labels = seen.labels if method.sees == "labelled images" else None
    task = Task.of(
        dense, preprocessing.input_size, seen.images, labels, job["keep"] / 100, dict(method.options)
    )
    try:
        slim = importlib.import_module(f"methods.{method.module}").prune(task)
    except OutOfReachError as error:
        print(error)
        return OUT_OF_REACH
    write_slim(job["file"], slim.model, slim.temperatures)
    probe = seen.images[:4]
    with torch.no_grad():
        # Plain attention reads the attribute scale: as the method left it.
        again = read_slim(dense, job["file"], slim.temperatures[0])
        same = torch.allclose(again(probe), slim.model(probe), atol=1e-4)
    print(json.dumps({**slim.checks, "same logits after reading back": "yes" if same else "no"}))
    return 0


def part_shared(job: Mapping[str, Any]) -> int:
    """Run mhacut with calibrations shared in a folder; write how many seconds that saved."""
    from methods.shared_calibration import SharedCalibration

    import mhacut.pruning.job
    from mhacut.cli.app import app

    shared = SharedCalibration(Path(job["folder"]))
    mhacut.pruning.job.calibrate = shared
    try:
        app(list(job["arguments"]))
    finally:
        Path(job["saved"]).write_text(json.dumps(shared.saved_s), encoding="utf-8")
    return 0


def part_reference(job: Mapping[str, Any]) -> int:
    """The dense model's logits on the whole validation split, to a file; its own score to stdout."""
    import torch
    from safetensors.torch import save_file

    from mhacut.surgery.flops import measure_flops

    loaded, preprocessing = read(setup_of(job))
    dense, device = loaded.model.eval().requires_grad_(False).to(job["device"]), torch.device(job["device"])
    logits, truths = [], []
    with torch.inference_mode():
        for images, labels in evaluation_images(setup_of(job), preprocessing, dense.num_classes):
            logits.append(dense(images.to(device)).cpu())
            truths.append(labels)
    reference, truth = torch.cat(logits), torch.cat(truths)
    save_file({"logits": reference, "labels": truth}, job["file"])
    found = {
        "flops": measure_flops(dense.cpu(), preprocessing.input_size),
        "images": len(truth),
        "best": "own",
        "scores": {"own": scores_of(reference, reference, truth)},
        "checks": {},
    }
    print(json.dumps(found))
    return 0


def part_score(job: Mapping[str, Any]) -> int:
    """Score slim models on the whole validation split, at every softmax temperature that is left open.

    The files of methods that leave it open are written anew with the better one folded in.
    """
    import torch
    from methods.common import read_slim, temperatures_of, write_slim
    from safetensors.torch import load_file

    from mhacut.measuring.latency import fixed_images, run_of, take_turns
    from mhacut.surgery.flops import measure_flops

    loaded, preprocessing = read(setup_of(job))
    dense, device = loaded.model.eval().requires_grad_(False), torch.device(job["device"])
    reference = load_file(job["reference"])
    cells = [
        {
            name: read_slim(dense, cell["file"], name).requires_grad_(False).to(device)
            for name in temperatures_of(cell["file"]) or ("own",)
        }
        for cell in job["cells"]
    ]
    logits: list[dict[str, list[Tensor]]] = [{name: [] for name in cell} for cell in cells]

    with torch.inference_mode():
        for images, _ in evaluation_images(setup_of(job), preprocessing, dense.num_classes):
            for models, collected in zip(cells, logits, strict=True):
                for name, model in models.items():
                    collected[name].append(model(images.to(device)).cpu())
    found = []
    for cell, models, collected in zip(job["cells"], cells, logits, strict=True):
        scores = {
            name: scores_of(reference["logits"], torch.cat(parts), reference["labels"])
            for name, parts in collected.items()
        }
        best = best_of(scores)
        if len(scores) > 1:
            write_slim(cell["file"], models[best].cpu(), ("own",))
        size = preprocessing.input_size
        images = fixed_images(LATENCY_BATCH, size).to(device)
        runs = [run_of(model.to(device), images) for model in (dense, models[best])]
        times = take_turns(runs, seconds=LATENCY_SECONDS, device=device)
        dense_ms, slim_ms = (1000 * statistics.median(own) for own in times)
        flops = measure_flops(models[best].cpu(), size)
        about = {"flops": flops, "latency_ratio": slim_ms / dense_ms}
        found.append({**about, "best": best, "scores": scores, "checks": {}})
    print(json.dumps(found))
    return 0


PARTS = {
    "read": part_read,
    "prune": part_prune,
    "shared": part_shared,
    "reference": part_reference,
    "score": part_score,
}


if __name__ == "__main__":
    sys.exit(PARTS[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))))
