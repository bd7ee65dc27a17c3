"""Record of a slim file that ``mhacut prune`` writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mhacut.checkpoint.provenance import license_for_history
from mhacut.checkpoint.record import SlimRecord
from mhacut.commands.prune_inputs import PruneInputs
from mhacut.commands.prune_targets import Reached, recorded_options
from mhacut.measuring.accuracy import Evaluation, accuracy_for_history
from mhacut.pruning.planner import Planned
from mhacut.pruning.preserve import Preserved
from mhacut.report.history import curves_to_json
from mhacut.runtime.device import software_versions


def slim_record(
    inputs: PruneInputs,
    planned: Planned,
    flops: int,
    evaluation: Evaluation | None = None,
    targets: Sequence[Reached] = (),
) -> SlimRecord:
    """Return what the slim file states about itself.

    Args:
        inputs: of the command.
        planned: its plan.
        flops: FLOPs of the slim model.
        evaluation: accuracy of the slim model, where it was measured.
        targets: those besides a budget of FLOPs, and what was reached.
    """
    options, loaded, plan = inputs.options, inputs.loaded, planned.plan
    bounded = inputs.targets["flops"] is not None or options.bounds_loss
    entry: dict[str, Any] = {
        "command": "prune",
        "options": {**recorded_options(options), "round_to": inputs.job.round_to},
        "seed": options.search.seed,
        **({"budget": inputs.budget} if bounded else {}),
        "flops_before": inputs.job.table.dense,
        "flops_after": flops,
        "source_sha256": loaded.sha256,
        "data": inputs.images.description,
        **_preserved(inputs.job.preserved),
        **inputs.provenance.to_history(),
        **accuracy_for_history(inputs.evaluation, evaluation),
        **({} if loaded.record is not None else license_for_history(loaded)),
        "versions": software_versions(),
    }
    if targets:
        entry["targets"] = [target.to_json() for target in targets]
    if planned.curves:
        entry["curves"] = curves_to_json(planned.curves, plan)
    earlier = loaded.record
    return SlimRecord(
        identity=loaded.identity,
        plan=plan if earlier is None else plan.after(earlier.plan),
        preprocessing=inputs.preprocessing.to_json(),
        history=(*(() if earlier is None else earlier.history), entry),
    )


def _preserved(preserved: Preserved | None) -> dict[str, Any]:
    """Return what was preserved, where it was not the answers, and its divergence, where it is no KL."""
    found: dict[str, Any] = {}
    if preserved is not None and preserved.what != "answers":
        found["preserved"] = preserved.to_json()
    if preserved is not None and preserved.measure != "answers":
        found["divergence_of"] = preserved.measure
    return found
