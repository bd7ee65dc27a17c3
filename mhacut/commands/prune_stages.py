"""Estimate of the time that each stage of ``mhacut prune`` takes."""

from __future__ import annotations

from mhacut.options.prune import PruneOptions
from mhacut.pruning.calibrate import held_out
from mhacut.pruning.job import Job
from mhacut.runtime.stages import StageShare

# Seconds on two cores, of plain ViTs of two sizes at two efforts (examples/benchmarks/overhead.py). Their
# ratios matter: what is left is estimated by the speed of the stages before.
_FORWARD = 0.008
"""Seconds of a forward pass of one image, per GFLOP."""
_PASS = 0.02
"""Seconds of a forward pass with moments, or of a backward pass, for one image, per GFLOP."""
_GATHERED = 0.6e-6
"""Seconds of the moments of one image, per channel, at any image size."""
_READ = 2e-3
"""Seconds of reading one image from a file."""
_RANKED = 0.25e-3
"""Seconds of ranking, per channel of a unit that is not wide; its sensitivity curve takes about as long."""
_WIDE = 1500
"""Number of channels ranked together at which each takes twice as long."""
_EXCHANGED = 1e-3
_REPAIRED = 0.2e-3
_HEALED = 8e-6
"""Seconds of one healing step, per channel, at any number of images."""
_WRITTEN = 0.5
_TIMED = 3.0
_REPORTED = 1.0

_SHARED = frozenset({"calibrating", "ranking channels", "measuring sensitivity curves", "timing"})
"""Stages that are run once for several files."""


def expected_stages(options: PruneOptions, job: Job, measured: int, files: int = 1) -> list[StageShare]:
    """Return the stages that ``mhacut prune`` has or had after it has read its inputs.

    Args:
        options: of the command.
        job: what is pruned.
        measured: number of batches that accuracy is measured on, before and after; 0 for none.
        files: number of files that are written.
    """
    search, count = options.search, len(job.images)
    gflops, kept = job.table.dense / 1e9, job.budget / 1e9
    held = held_out(count)
    channels = sum(unit.heads * unit.width for unit in job.units)
    differentiated = job.fisher_options.images
    together = [
        (unit.heads, unit.width) if unit.kind == "qk" else (1, unit.heads * unit.width) for unit in job.units
    ]
    ranked = sum(_RANKED * heads * width * (1 + (width / _WIDE) ** 2) for heads, width in together)
    by_curves = search.allocation in ("curves", "refined")
    trained = 3 * kept * search.batch_size * _PASS
    healed = search.healed_steps * (trained + _HEALED * channels)
    passes = count + 2 * differentiated
    both = _FORWARD * count * (gflops + kept)
    seconds = {
        "evaluating": measured * search.batch_size * (2 * _READ + _FORWARD * (gflops + kept)),
        "calibrating": passes * (_PASS * gflops + _GATHERED * channels),
        "ranking channels": ranked,
        "measuring sensitivity curves": ranked * by_curves,
        "choosing merges": _FORWARD * 6 * 64 * gflops * job.merges_tokens,
        "searching": trained * search.steps * search.by_indicators,
        "swapping channels": _EXCHANGED * channels * search.swaps,
        "repairing": _REPAIRED * channels,
        "cutting": _WRITTEN,
        "repairing in order": _PASS * 2 * count * (gflops + kept) * search.repairs_in_order,
        "reweighting": trained * search.trained_gain_steps,
        "healing": healed + both * (search.healed_steps > 0),
        "tuning": trained * search.tuned_steps,
        "writing": _WRITTEN * (not options.dry_run),
        "comparing": _FORWARD * max(held, 1) * kept,
        "timing": _TIMED * (options.timing.latency or options.max_latency is not None),
        "reporting": _REPORTED * (options.report is not None),
    }
    found = []
    for stage, share in seconds.items():
        visits = 1 if stage in _SHARED else files
        if measured and stage in ("evaluating", "writing"):
            # The dense model is evaluated too; a file is written once more to state its accuracy.
            visits = files + 1 if stage == "evaluating" else 2 * files
            share = share * (files + 1) / 2 if stage == "evaluating" else share * files
        elif stage not in _SHARED:
            share = share * files
        found.append(StageShare(stage, share, visits))
    return [share for share in found if share.share > 0]
