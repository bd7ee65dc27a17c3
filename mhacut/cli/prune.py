"""``mhacut prune``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhacut.budget import format_amount
from mhacut.cli.flags import command
from mhacut.cli.measure import preprocessing_lines
from mhacut.cli.running import Console
from mhacut.commands.prune_names import check_output_paths
from mhacut.errors import option_name
from mhacut.options.prune import PruneOptions
from mhacut.text import safe, safe_table

if TYPE_CHECKING:
    from mhacut.commands.prune_attempt import TargetResult
    from mhacut.commands.prune_result import PruneResult
    from mhacut.measuring.accuracy import ModelFigures

_IN_JSON = (
    *("output", "report", "verdict", "much_lost", "advice", "architecture", "budget", "targets"),
    *("divergence", "preserved", "data", "preprocessing", "provenance", "not_prunable", "plan"),
    *("device", "timing", "seconds", "log"),
)
_WIDTHS = ("layer", "kind", "heads", "dense_width", "width")
_USUAL = ("flops", "params", "size", "max_latency", "max_drop", "data_dir", "output", "effort", "scope")


@command(
    PruneOptions,
    usual=(*_USUAL, "preserve", "model", "device", "overwrite"),
    check_outputs=check_output_paths,
)
def prune(options: PruneOptions, console: Console) -> None:
    """Prune CHECKPOINT to a budget.

    Writes a slim safetensors file. Images in --data-dir make the result more accurate and need no labels.
    Several GPUs: torchrun --nproc-per-node N -m mhacut prune ...

    Examples:
      half the FLOPs     mhacut prune vit.safetensors --flops 50% --data-dir images/
      12 ms per batch    mhacut prune vit.safetensors --max-latency 12ms
      a file of 10 MB    mhacut prune vit.safetensors --size 10MB
      patch features     mhacut prune vit.safetensors --flops 50% --preserve tokens
    """
    from mhacut.commands.prune import run_prune
    from mhacut.commands.prune_result import PruneResults

    results = run_prune(options, console)
    if len(results) == 1:
        console.result(_text(results[0]), _document(results[0]))
        return
    budgets = PruneResults(results)
    texts = [safe_table(budgets.rows()), *map(_text, results)]
    if options.report is not None:
        texts.append(f"overview {safe(options.report)}")
    pareto = [{"budget": "dense", **_figures(results[0].dense), "divergence": None}]
    for choice, result in zip(budgets.choices(), results, strict=True):
        pareto.append({"budget": choice.budget, **_figures(result.slim), "divergence": result.divergence})
    document = {"pareto": pareto, "results": [*map(_document, results)]}
    console.result("\n\n".join(texts), document)


def _text(result: PruneResult) -> str:
    lines = [*map(safe, result.verdict_lines()), "", safe_table(result.rows()), ""]
    if [target.name for target in result.targets] != ["flops"]:
        lines += map(_target, result.targets)
    if result.output is None:
        lines.append("dry run: no model was written")
    else:
        lines.append(f"saved {safe(result.output)}")
        load = "load_model" if result.output.suffix == ".safetensors" else "load_pruned"
        lines.append(f"loads with: mhacut.{load}({str(result.output)!r})")
    if result.report is not None:
        lines.append(f"report {safe(result.report)}")
    lines.append(f"searched on {safe(result.data)}")
    lines += preprocessing_lines(result.preprocessing, result.provenance)
    lines += [f"not prunable: {safe(line)}" for line in result.not_prunable]
    return "\n".join(lines)


def _target(target: TargetResult) -> str:
    limit, reached = target.labels
    option = option_name(target.name, target.spec)
    if not target.measured:
        return target.text
    about = target.measured
    dense, predicted, wall = (
        format_amount(1e6 * about[name], "max_latency") for name in ("dense", "predicted", "wall")
    )
    # With 1 CPU thread, models are compared by processor time, which excludes other programs.
    by_processor = (about["device"], about["threads"]) == ("cpu", 1)
    clock = "processor time" if by_processor else "wall time"
    ratio = 100 * target.reached / about["dense"]
    corrected = f", plan corrected {about['corrections']} time(s)" if about["corrections"] else ""
    where = f"{about['runtime']}{', INT8' if about['int8'] else ''}, batch {about['batch_size']}"
    return (
        f"{option}: {clock} {reached} per batch, limit {limit}; dense model {dense} (ratio {ratio:.1f}%); "
        f"predicted {predicted}{corrected}\n"
        f"timed in {where}, {about['threads']} thread(s), {safe(about['device'])}: {safe(about['machine'])}"
        + (f"; wall time {wall} per batch" if by_processor else "")
    )


def _document(result: PruneResult) -> dict[str, Any]:
    return {
        **{name: getattr(result, name) for name in _IN_JSON},
        "dense": _figures(result.dense),
        "slim": _figures(result.slim),
        "divergence_of": result.metric,
        "agreement": result.fidelity.agreement,
        "judged_on": result.fidelity.images,
        "judged_images": result.fidelity.sample,
        "layers": [{name: getattr(unit, name) for name in _WIDTHS} for unit in result.plan],
        "tokens": result.plan.tokens,
    }


def _figures(figures: ModelFigures) -> dict[str, Any]:
    costs = {name: getattr(figures, name) for name in ("flops", "parameters", "size", "latency_ms")}
    return costs | {name: getattr(figures.evaluation, name, None) for name in ("top1", "top5", "images")}
