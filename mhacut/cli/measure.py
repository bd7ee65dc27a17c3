"""``mhacut evaluate``, ``mhacut bench`` and ``mhacut models``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhacut.budget import format_flops
from mhacut.cli.flags import command
from mhacut.cli.running import Console
from mhacut.errors import UsageError
from mhacut.options.measure import BenchOptions, EvaluateOptions, ModelsOptions
from mhacut.text import safe, table

if TYPE_CHECKING:
    from mhacut.checkpoint.preprocessing import Provenance
    from mhacut.commands.bench import BenchResult, Timing
    from mhacut.commands.models import CatalogueEntry
    from mhacut.data import Preprocessing


@command(
    EvaluateOptions,
    usual=("data_dir", "dataset", "class_map", "val_split", "batch_size", "model", "num_classes", "device"),
)
def evaluate(options: EvaluateOptions, console: Console) -> None:
    """Measure the accuracy of CHECKPOINT.

    Images need labels. The checkpoint's own preprocessing is used, unless flags override it.

    Example: mhacut evaluate vit-50pct.safetensors --data-dir images/
    """
    from mhacut.commands.evaluate import run_evaluate

    measured = run_evaluate(options, console)
    lines = [
        table(measured.rows()),
        "",
        f"model: {safe(measured.architecture)} from {safe(measured.source)}",
        f"data: {safe(measured.data)}, in {measured.evaluation.seconds:.1f} s on {safe(measured.device)}",
        *preprocessing_lines(measured.preprocessing, measured.provenance),
    ]
    console.result("\n".join(lines), measured)


def preprocessing_lines(preprocessing: Preprocessing, provenance: Provenance) -> list[str]:
    """Describe the preprocessing and its source, and suggest a better preprocessing."""
    lines = [f"preprocessing: {safe(provenance.describe(preprocessing))}"]
    return lines if provenance.hint is None else [*lines, safe(provenance.hint)]


@command(
    BenchOptions,
    usual=("batch_sizes", "threads", "runtime", "device", "dtype", "int8", "seconds", "model"),
)
def bench(options: BenchOptions, console: Console) -> None:
    """Compare the speed of checkpoints.

    The checkpoints are timed in turns, so that other load on the machine slows all of them equally. Ratios
    are more reliable than milliseconds. Memory on a GPU is the peak of weights, images and activations.

    Example: mhacut bench vit.safetensors vit-50pct.safetensors --threads 2
    """
    from mhacut.commands.bench import run_bench

    result = run_bench(options, console)
    console.result(_benched(result), result)


def _benched(result: BenchResult) -> str:
    costs = [["", "FLOPs", "parameters", "file, MB"]]
    times = [["", "batch", "ms", "+-", "images/s", "ratio", "saved", "executed", "peak MiB"]]
    for number, model in enumerate(result.models, start=1):
        size = "" if model.file_bytes is None else f"{model.file_bytes / 1e6:.1f}"
        name = f"[{number}] {safe(model.source)}{' in INT8' if model.int8 else ''}"
        costs.append([name, format_flops(model.flops), format_flops(model.parameters), size])
    for index in range(len(result.models[0].timings)):
        for number, model in enumerate(result.models, start=1):
            times.append([f"[{number}]", *_cells(model.timings[index])])
    told = any(row[-2] for row in times[1:])
    filled = [column for column in zip(*times, strict=True) if any(column[1:])]
    return "\n".join(
        [
            table(costs),
            "",
            table(list(zip(*filled, strict=True))),
            "",
            f"{result.runtime}, {result.dtype} on {safe(result.device)}, {result.threads} thread(s)",
            "ratio: median time relative to [1] in the same round",
            "saved: saved time as a percentage of the saved FLOPs",
            *["executed: multiply-accumulates that run, padding included, relative to [1]"] * told,
        ]
    )


def _cells(timing: Timing) -> list[str]:
    shares = ((timing.ratio, ".1f"), (timing.saving_realised, ".0f"), (timing.executed, ".1f"))
    return [
        str(timing.batch_size),
        f"{timing.median_ms:.2f}",
        f"{timing.spread_ms:.2f}",
        f"{1000 * timing.batch_size / timing.median_ms:.1f}",
        *("" if share is None else f"{100 * share:{digits}}%" for share, digits in shares),
        "" if timing.peak_mib is None else f"{timing.peak_mib:.0f}",
    ]


@command(ModelsOptions, usual=("refused",))
def models(options: ModelsOptions, console: Console) -> None:
    """List timm models and their prunable channels.

    FLatten Transformers are included. Each model is built without weights. Models without attention are
    counted and not listed.

    Example: mhacut models 'swin*'
    """
    from mhacut.commands.models import catalogue

    console.start("building models")
    entries = catalogue(options.pattern, console.advance)
    if not entries:
        hint = f"*{options.pattern.strip('*')}*"
        hint = "" if hint == options.pattern else f"; try {hint!r}"
        raise UsageError(f"{options.pattern!r}: no matching model in timm{hint}")
    console.result(_listed(entries, options.refused), {"models": entries})


def _listed(entries: tuple[CatalogueEntry, ...], refused: bool) -> str:
    attending = [entry for entry in entries if entry.transformer]
    cut = [entry for entry in attending if entry.refusal is None]
    rows = [["architecture", "tags", "why"] if refused else ["architecture", "tags", "cut", "attention"]]
    for entry in attending:
        name = [entry.architecture, str(len(entry.tags))]
        if refused and entry.refusal is not None:
            rows.append([*name, entry.refusal.partition(". ")[0]])
        elif not refused:
            kinds = " ".join(entry.kinds) + ("*" if entry.not_prunable else "")
            kinds += "" if entry.tokens_stay else " tokens"
            rows.append([*name, kinds or "-", ", ".join(entry.attention) or "-"])
    tags = [sum(len(entry.tags) for entry in entries) for entries in (cut, attending)]
    if not attending:
        return f"{len(entries)} architecture(s) without attention"
    lines = [table(rows), ""] if len(rows) > 1 else []
    lines.append(
        f"{len(cut)} of {len(attending)} architectures with attention can be pruned ({tags[0]} of {tags[1]} "
        f"pretrained tags); attention channels in {sum(bool(entry.attention) for entry in cut)}; "
        f"tokens merge in {sum(not entry.tokens_stay for entry in cut)}; "
        f"{len(entries) - len(attending)} have no attention"
    )
    if not refused:
        lines += ["-: refused; --refused shows the reasons"] * (len(cut) < len(attending))
        partly = any(entry.not_prunable for entry in cut)
        lines += ["*: partly prunable; --json shows the parts and reasons"] * partly
    return "\n".join(lines)
