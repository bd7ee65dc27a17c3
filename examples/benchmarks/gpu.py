"""All that mhacut has not measured on a GPU, from one command that takes at most nine minutes.

    python examples/benchmarks/gpu.py --output gpu.json

prints a table per part and writes all numbers to the file, also those measured before it is stopped; the same
command then measures what is missing. Weights and images are random; nothing is downloaded. Parts, each in a
process of its own:

- ``same``: a small model pruned on the device and on the CPU: widths and logits that differ; and, by stage,
  what stays on the CPU: seconds in its operators, copies from the device, numbers read from it.
- ``latency``: dense, channels, tokens, other roundings, equal widths of q/k and v; eager and in CUDA graphs.
- ``finetune``: images per second, with ``--amp`` and without.
- ``sums``: float64 sums of the calibration and eigenvectors, on the device and on the CPU.
- ``prune``: seconds of all stages and peak memory, by model and effort.
- ``compile``: latency under ``torch.compile``, as far as the time lasts.

``--smoke --device cpu`` takes tiny sizes, to see that all of it runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from process import FailedError, describe_machine, run

Row = dict[str, Any]
SIZES: dict[str, Any] = {
    "model_args": {},
    "small": "deit_tiny_patch16_224",
    "models": ["deit_small_patch16_224", "deit_base_patch16_224", "vit_large_patch16_224"],
    "efforts": ["fast", "balanced", "best"],
    "images": None,
    "batches": [1, 8, 64, 256],
    "dtypes": ["float32", "float16", "bfloat16"],
    "roundings": [8, 16, 32],
    "seconds": 0.5,
    "steps": 30,
    "batch": 128,
    "sums": [(32 * 197, width) for width in (192, 384, 768, 3072)],
}
SMOKE: dict[str, Any] = {
    "model_args": {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3},
    "small": "vit_tiny_patch16_224",
    "models": ["vit_tiny_patch16_224"],
    "efforts": ["fast"],
    "images": 8,
    "batches": [1, 2],
    "dtypes": ["float32", "bfloat16"],
    "roundings": [8],
    "seconds": 0.01,
    "steps": 3,
    "batch": 4,
    "sums": [(64, 16)],
}
SHARES = {"same": 0.15, "latency": 0.3, "finetune": 0.25, "sums": 0.1, "prune": 0.7, "compile": 1.0}
"""Of the time that is left when a part begins, what it may take."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try the script")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="(default: gpu.json)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: 9)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the CPU (default: all)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    asked = parser.parse_args(arguments)
    sizes = SMOKE if asked.smoke else SIZES
    document: dict[str, Any] = {"rows": {}, "failed": {}}
    if asked.output.exists():
        document = json.loads(asked.output.read_text(encoding="utf-8"))
    ends = time.monotonic() + 60 * asked.minutes
    about = {**machine(asked.device, asked.threads), "sizes": "smoke" if asked.smoke else "full"}
    if document.get("machine", about) != about:
        parser.error(f"{asked.output} was made on another machine or by other sizes: name another --output")
    document |= {"machine": about, "failed": {}}
    for part in asked.parts:
        left = ends - time.monotonic()
        job = {"device": asked.device, "sizes": sizes, "known": list(document["rows"])}
        for row in measure(part, job, asked.threads, max(left, 0) * SHARES[part]):
            document["rows"][row.pop("name")] = row
        failed = {name: row.pop("failed") for name, row in document["rows"].items() if "failed" in row}
        document["rows"] = {name: row for name, row in document["rows"].items() if name not in failed}
        document["failed"] |= failed
        asked.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    print(as_text(document))
    return 0


def machine(device: str, threads: int) -> dict[str, str]:
    """The GPU and the machine around it."""
    code = "import sys, torch; d = sys.argv[1]; print(torch.__version__, torch.version.cuda); "
    code += "print(torch.cuda.get_device_name(d) if d.startswith('cuda') else d)"
    try:
        versions, name = run([sys.executable, "-c", code, device], 1).stdout.strip().splitlines()
    except FailedError as error:
        sys.exit(f"--device {device}: {error}")
    return {"device": name, "torch, CUDA": versions, **describe_machine(threads)}


def measure(part: str, job: Mapping[str, Any], threads: int, seconds: float) -> list[Row]:
    """Rows of a part that are not known yet, measured in a process of its own; it has so many seconds."""
    print(f"{part}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        file, rows = Path(folder) / "job.json", Path(folder) / "rows"
        rows.touch()
        file.write_text(json.dumps({**job, "part": part, "seconds": 0.8 * seconds, "rows": str(rows)}))
        code = "import sys; sys.path.insert(0, sys.argv[1]); import gpu; gpu.run_part(sys.argv[2])"
        command = [sys.executable, "-c", code, str(Path(__file__).parent), str(file)]
        failed = []
        try:
            run(command, threads, limit_s=seconds)
        except FailedError as error:
            failed = [{"name": part, "failed": str(error)}]
        return [*map(json.loads, rows.read_text(encoding="utf-8").splitlines()), *failed]


def run_part(file: str) -> None:
    """Do the part of a job until its time is up; each row goes to the job's file as it comes."""
    job = json.loads(Path(file).read_text(encoding="utf-8"))
    ends = time.monotonic() + job["seconds"]
    with open(job["rows"], "a", encoding="utf-8") as rows:
        for name, measured in PARTS[job["part"]](job):
            if name in job["known"] or time.monotonic() > ends:
                continue
            try:
                row = measured()
            except Exception as error:  # one that fails, for want of memory say, is a result too
                row = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            rows.write(json.dumps({"name": name, **row}) + "\n")
            rows.flush()


Part = Iterator[tuple[str, Callable[[], Row]]]


def part_same(job: Mapping[str, Any]) -> Part:
    """A small model pruned on both, then on the device with a ledger, which changes what torch computes."""

    def measured(scope: str) -> Row:
        import torch

        on_cpu, there = pruned(job, scope=scope, device="cpu"), pruned(job, scope=scope)
        units = list(zip(on_cpu.plan.units, there.plan.units, strict=True))
        merged = [result.plan.tokens.merged for result in (on_cpu, there)]
        images, model = noise(job, 8), on_cpu.model().eval()
        with torch.inference_mode():
            expected = model(images)
            same = model.to(job["device"])(images.to(job["device"])).cpu()
            other = there.model().eval()(images)
        return {
            "units of other widths": sum(len(a.kept[0]) != len(b.kept[0]) for a, b in units),
            "units of other channels": sum(a.kept != b.kept for a, b in units),
            "same merges": merged[0] == merged[1],
            "logits of the device, largest difference": float((same - expected).abs().max()),
            "logits of its plan, largest difference": float((other - expected).abs().max()),
            "largest logit": float(expected.abs().max()),
        }

    def booked() -> Row:
        with new_ledger() as ledger:
            pruned(job, effort="balanced", images=32, reporter=ledger)
        return {"stages": ledger.told()}

    for scope in ("attention+mlp", "attention+mlp+tokens"):
        yield f"same {scope}", lambda scope=scope: measured(scope)
    yield "what stays on the CPU", booked


def part_prune(job: Mapping[str, Any]) -> Part:
    """Every model at every effort, the cheap ones first."""
    import resource

    import torch

    def measured(model: str, effort: str) -> Row:
        cuda = job["device"].startswith("cuda")
        if cuda:
            torch.zeros(1, device=job["device"])  # there is nothing to reset before the first tensor
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(job["device"])
        began = time.perf_counter()
        result = pruned(job, model=model, effort=effort, images=job["sizes"]["images"])
        took = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated(job["device"]) / 2**20 if cuda else 0.0
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        about = {"s": took, "device peak MiB": peak, "host peak MiB so far": host}
        return {**about, "stages": dict(result.seconds)}

    for effort, model in itertools.product(job["sizes"]["efforts"], job["sizes"]["models"]):
        yield f"prune {model} {effort}", lambda model=model, effort=effort: measured(model, effort)


def part_latency(job: Mapping[str, Any]) -> Part:
    """All models in turns, by mode, dtype and batch."""
    modes = ["eager", "graph"] if job["device"].startswith("cuda") else ["eager"]
    return latencies(job, modes, some_models(job, few_only=False))


def part_compile(job: Mapping[str, Any]) -> Part:
    """The same compiled, of fewer models: each takes long to compile."""
    return latencies(job, ["compile"], some_models(job, few_only=True))


def some_models(job: Mapping[str, Any], *, few_only: bool) -> dict[str, Any]:
    """The dense model and those pruned to half its FLOPs in the ways that are timed."""
    name = job["sizes"]["models"][0]
    models, few = {"dense": dense_model(job, name)}, {"model": name, "images": 8}
    for rounding in (8,) if few_only else job["sizes"]["roundings"]:
        models[f"channels {rounding}"] = pruned(job, scope="attention+mlp", round_to=rounding, **few).model()
    if not few_only:
        models["equal qkv"] = pruned(job, scope="attention+mlp", equal_qkv=True, **few).model()
    models["tokens"] = pruned(job, scope="attention+mlp+tokens", **few).model()
    return models


def latencies(job: Mapping[str, Any], modes: Sequence[str], models: Mapping[str, Any]) -> Part:
    import torch

    from mhacut.measuring.latency import run_of, take_turns
    from mhacut.runtime.device import many_compiled

    device = torch.device(job["device"])

    def measured(mode: str, dtype: str, batch: int) -> Row:
        images = noise(job, batch).to(device, getattr(torch, dtype))
        runs: dict[str, Callable[[], object]] = {}
        row: Row = {}
        for name, model in models.items():
            placed = model.eval().requires_grad_(False).to(device, getattr(torch, dtype))
            program = torch.compile(placed, dynamic=False) if mode == "compile" else placed
            try:
                runs[name] = graph_of(program, images) if mode == "graph" else run_of(program, images)
            except RuntimeError as error:  # what waits for the device cannot be in a graph
                row[f"{name} has no graph"] = f"{error}"[:200]
        with many_compiled():
            times = take_turns(list(runs.values()), seconds=job["sizes"]["seconds"], device=device)
        return {"ms": {name: medianed(own) for name, own in zip(runs, times, strict=True)}, **row}

    sizes = job["sizes"]
    for mode, batch, dtype in itertools.product(modes, sizes["batches"], sizes["dtypes"]):
        yield f"{mode} {dtype} batch {batch}", lambda m=mode, d=dtype, b=batch: measured(m, d, b)


def medianed(seconds: Sequence[float]) -> float:
    """Milliseconds."""
    return 1000 * statistics.median(seconds)


def graph_of(model: Any, images: Any) -> Callable[[], object]:
    """A run of ``model`` as a CUDA graph."""
    import torch

    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(images)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(images)
    return graph.replay


def part_finetune(job: Mapping[str, Any]) -> Part:
    """Images per second of the command's steps, from a folder, learning from the dense model."""
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    import mhacut
    from mhacut.runtime.progress import Silent

    sizes = job["sizes"]
    folder = Path(job["rows"]).parent
    name = sizes["models"][0]
    side = noise(job, 1).shape[-1]
    generator = torch.Generator().manual_seed(0)
    for number in range(2 * sizes["batch"]):
        file = folder / "images" / "train" / f"{number % 2}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse = torch.randint(0, 256, (14, 14, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(coarse.numpy()).resize((side, side)).save(file)
    dense, slim = folder / "dense.safetensors", folder / "slim.safetensors"
    model = dense_model(job, name, classes=2)
    save_file(model.state_dict(), dense)
    few = {"flops": "50%", "effort": "fast", "calibration_images": 8, "latency": False, "progress": False}
    named = {"model": name, "model_args": sizes["model_args"]}
    mhacut.prune(str(dense), output=slim, device=job["device"], **few, **named)

    def measured(amp: bool) -> Row:
        times: list[float] = []

        class Clock(Silent):
            def advance(self, done: int, total: int, detail: str = "") -> None:
                times.append(time.perf_counter())

        training = {"steps": sizes["steps"], "batch_size": sizes["batch"], "lr": 1e-4, "eval_images": 0}
        output = folder / f"run-{amp}"
        teacher = {"teacher": str(dense), "labels": False}
        teacher |= {f"teacher_{key}": value for key, value in named.items()}
        data = {"data_dir": folder / "images", "output": output}
        options = {**training, **teacher, **data, "amp": amp, "device": job["device"]}
        mhacut.finetune(slim, reporter=Clock(), **options)
        del times[: -sizes["steps"]]
        middle = len(times) // 3  # the first steps wait for the workers to start
        rate = sizes["batch"] * (len(times) - 1 - middle) / (times[-1] - times[middle])
        return {"images per s": rate}

    for amp in (False, True):
        yield f"finetune{' --amp' * amp}, batch {sizes['batch']}", lambda amp=amp: measured(amp)


def part_sums(job: Mapping[str, Any]) -> Part:
    """Moments of activations, and eigenvectors of their covariance, both in float64."""
    import torch

    from mhacut.linalg.moments import Moments
    from mhacut.measuring.latency import take_turns

    device = torch.device(job["device"])

    def measured(rows: int, width: int) -> Row:
        x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(device)
        second = Moments.of(x).second
        runs = {
            "sums on the device": lambda: Moments.of(x),
            "sums on the CPU": lambda: Moments.of(x.cpu()),
            "eigenvectors on the device": lambda: torch.linalg.eigh(second),
            "eigenvectors on the CPU": lambda: torch.linalg.eigh(second.cpu()),
        }
        times = take_turns(list(runs.values()), seconds=job["sizes"]["seconds"], device=device)
        return {"ms": {name: medianed(own) for name, own in zip(runs, times, strict=True)}}

    for rows, width in job["sizes"]["sums"]:
        yield f"sums {rows} x {width}", lambda rows=rows, width=width: measured(rows, width)


PARTS: dict[str, Callable[[Mapping[str, Any]], Part]] = {
    "same": part_same,
    "latency": part_latency,
    "finetune": part_finetune,
    "sums": part_sums,
    "prune": part_prune,
    "compile": part_compile,
}


def new_ledger() -> Any:
    """A reporter, and a mode of torch that books each operator under the stage that runs it."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from mhacut.runtime.progress import Silent

    class Ledger(TorchDispatchMode, Silent):
        def __init__(self) -> None:
            super().__init__()
            self.stage = "reading"
            self.books: dict[str, Counter[str]] = {}

        def start(self, stage: str) -> None:
            self.stage = stage

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            began = time.perf_counter()
            out = function(*args, **(kwargs or {}))
            took = time.perf_counter() - began
            takes, gives = (
                {x.device.type for x in tree_leaves(y) if isinstance(x, torch.Tensor)} for y in (args, out)
            )
            book = self.books.setdefault(self.stage, Counter())
            if takes | gives <= {"cpu"}:
                book["CPU operators, s"] += took
            elif "meta" not in takes | gives:
                book["operators of the device"] += 1
                book["numbers read"] += function is torch.ops.aten._local_scalar_dense.default
                book["copies to the CPU"] += gives == {"cpu"} and takes != {"cpu"}
            return out

        def told(self) -> dict[str, dict[str, float]]:
            return {stage: {n: round(v, 3) for n, v in book.items()} for stage, book in self.books.items()}

    return Ledger()


def dense_model(job: Mapping[str, Any], name: str, classes: int = 100) -> Any:
    """A model of random weights, larger than timm's, so that its outputs depend on the image."""
    import timm
    import torch

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=classes, **job["sizes"]["model_args"]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return model


def noise(job: Mapping[str, Any], count: int) -> Any:
    """Smooth images of the model's size, [count, 3, H, W]."""
    import torch

    side = job["sizes"]["model_args"].get("img_size", 224)
    coarse = torch.randn(count, 3, 14, 14, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")


def pruned(
    job: Mapping[str, Any], *, model: str | None = None, images: int | None = 32, **options: Any
) -> Any:
    """Result of a dry run to half the FLOPs."""
    import mhacut
    from mhacut.options.prune import EFFORTS

    given = {"device": job["device"], "effort": "fast", "flops": "50%", "progress": False, **options}
    count = images or EFFORTS[given["effort"]].calibration_images
    seen = noise(job, count)
    dense = dense_model(job, model or job["sizes"]["small"])
    given |= {"model_args": job["sizes"]["model_args"], "calibration_images": count}
    return mhacut.prune(dense, images=seen, dry_run=True, latency=False, **given)


def as_text(document: Mapping[str, Any]) -> str:
    """Lines of all rows: numbers by name, then stages, then what failed."""
    lines = []
    for name, row in document["rows"].items():
        cells = {**row, **row.get("ms", {})}
        told = [
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in cells.items()
            if not isinstance(value, dict)
        ]
        lines.append(f"{name}: {', '.join(told)}" + " (ms)" * ("ms" in row))
        for stage, spent in row.get("stages", {}).items():
            shown = (
                f"{spent:.1f} s"
                if isinstance(spent, float)
                else ", ".join(f"{key} {value:g}" for key, value in spent.items())
            )
            lines.append(f"    {stage}: {shown}")
    lines += [f"failed: {name}: {reason}" for name, reason in document["failed"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
