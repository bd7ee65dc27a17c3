"""Targets of ``mhacut prune``: the amounts they allow, and what was reached."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mhacut.budget import RESOURCES, Resource, Targets, format_amount
from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.write import expected_header
from mhacut.commands.prune_latency import AIM, lowest_time
from mhacut.errors import option_name
from mhacut.measuring.figures import ModelFigures
from mhacut.measuring.layer_times import TimeTable
from mhacut.measuring.time_curve import TimeCurve
from mhacut.options.prune import TARGETS, PruneOptions
from mhacut.plan import Plan, UnitKey, UnitPlan
from mhacut.pruning.job import Job
from mhacut.pruning.limits import Limit, Limits, lowest_flops, reachable_amounts
from mhacut.surgery.costs import Dtypes, byte_table, count_bytes, parameter_table
from mhacut.surgery.flops import count_parameters


@dataclass(frozen=True)
class Reached:
    """One target, and the amount that the slim model reached."""

    name: str
    """Name of the option."""
    asked: str
    """Text as the user wrote it."""
    most: float
    """Largest amount allowed: FLOPs, parameters, bytes, milliseconds, nats, or points."""
    reached: float
    standard_error: float | None = None
    """Standard error of ``reached``, where it is estimated on images."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """For a time: the conditions under which ``reached`` was measured, and the prediction."""

    def to_json(self) -> dict[str, Any]:
        error = {} if self.standard_error is None else {"standard_error": self.standard_error}
        return {
            "target": self.name,
            "asked": self.asked,
            "most": self.most,
            "reached": self.reached,
            **error,
            **self.measured,
        }


class Reach:
    """Amounts of a model at any widths, for the targets given."""

    def __init__(
        self,
        options: PruneOptions,
        loaded: Checkpoint,
        job: Job,
        times: TimeTable | TimeCurve | None = None,
    ) -> None:
        """Take what is to be pruned.

        Args:
            options: of the command.
            loaded: the checkpoint.
            job: the job, whatever its images and limits.
            times: where a time is a target.
        """
        self.options, self.loaded, self.job, self.times = options, loaded, job, times
        self.dtypes = stored_dtypes(loaded, job.model)

    def limits(self, targets: Targets) -> tuple[int, Limits]:
        """Return the FLOPs that the targets allow, and the limits on parameters, bytes and time.

        Args:
            targets: of one file; none where a bound on the loss decides.

        Raises:
            BudgetError: a budget is out of reach, or there is nothing to prune.
        """
        job, table, choices = self.job, self.job.table, self.job.allowed
        least = {key: widths[0] for key, widths in choices.items()}
        dense: dict[Resource, int] = {"flops": table.dense}
        costs: dict[Resource, Any] = {"flops": (job.fewest or table).flops}
        copies = self.options.search.positions != "equal"
        if targets["params"] is not None:
            stored = parameter_table(job.model, job.prunable, least, copies=copies)
            dense["params"], costs["params"] = count_parameters(self.loaded.model), stored.at
        if targets["size"] is not None:
            stored = byte_table(job.model, job.prunable, least, self.dtypes, copies=copies)
            dense["size"] = count_bytes(self.loaded.model, self.loaded.dtypes)
            costs["size"] = self._file_size(stored.at, least)
        if self.times is not None:
            dense["max_latency"], costs["max_latency"] = self.times.dense, self._time()
        lowest = {resource: lowest_flops(choices, cost) for resource, cost in costs.items()}
        if self.times is not None:
            lowest["max_latency"] = lowest_time(costs["max_latency"], job)
        scope = "attention+mlp" if any(unit.kind == "hidden" for unit in self.job.units) else "attention"
        scope += "+tokens" if job.fewest else ""
        named: list[tuple[str, object]] = [("scope", scope), ("round_to", job.round_to)]
        named += [(name, value) for name, value, _ in job.constraints.without_each()]
        amounts = reachable_amounts(targets, dense, lowest, [option_name(*each) for each in named])
        if "max_latency" in amounts:
            amounts["max_latency"] = math.ceil(AIM * amounts["max_latency"])
        curve = self.times if isinstance(self.times, TimeCurve) else None
        storage = [
            Limit(costs[resource], most, resource, curve if resource == "max_latency" else None)
            for resource, most in amounts.items()
            if resource != "flops" and most < dense[resource]
        ]
        return min(amounts.get("flops", table.dense), table.dense), tuple(storage)

    def _time(self) -> Callable[[Mapping[UnitKey, int]], int]:
        """Return the nanoseconds per batch at widths; if tokens may be merged, with all of them or none."""
        times = self.times
        if not isinstance(times, TimeCurve):
            assert times is not None
            return times.at
        assert self.job.fewest is not None
        tables = ((self.job.table, False), (self.job.fewest, True))
        return lambda widths: min(times.at(int(t.flops(widths)), merges=merges) for t, merges in tables)

    def _file_size(self, tensors: Any, least: Mapping[UnitKey, int]) -> Any:
        """Return the bytes of the file as a function of widths: tensors, and a header that names channels."""
        digits = {unit.key: unit.heads * (len(str(unit.width - 1)) + 1) for unit in self.job.units}

        def text(widths: Mapping[UnitKey, int]) -> int:
            return sum(each * widths[key] for key, each in digits.items())

        rest = self._header(least) - text(least)
        return lambda widths: tensors(widths) + text(widths) + rest

    def _header(self, least: Mapping[UnitKey, int]) -> int:
        """Approximate bytes of the header at the least widths; counted exactly before a file is written."""
        loaded, identity = self.loaded, self.loaded.identity
        plan = Plan(
            tuple(
                UnitPlan(*unit.key, unit.width, (tuple(range(unit.width))[-least[unit.key] :],) * unit.heads)
                for unit in self.job.units
            )
        )
        earlier = () if loaded.record is None else loaded.record.history
        stated = [identity.model_args, identity.pretrained_cfg, plan.to_json(), list(earlier)]
        stated.append(recorded_options(self.options))
        return expected_header(stated, tensors=len(self.job.model.state_dict()), curves=len(self.job.units))


def reached_budgets(inputs: Any, slim: ModelFigures) -> tuple[Reached, ...]:
    """Return the amount that the model uses of each budget.

    Args:
        inputs: inputs of the file.
        slim: figures of the slim model.
    """
    targets, job, loaded = inputs.targets, inputs.job, inputs.loaded
    most: dict[Resource, int] = {"flops": inputs.budget}
    most.update({limit.resource: limit.most for limit in inputs.storage})
    used = {"flops": slim.flops, "params": slim.parameters, "size": slim.size or 0}
    dense = {"params": count_parameters(loaded.model), "size": count_bytes(loaded.model, loaded.dtypes)}
    return tuple(
        Reached(
            budget.resource,
            budget.text,
            most.get(budget.resource, budget.amount(dense.get(budget.resource, job.table.dense))),
            used[budget.resource],
        )
        for budget in targets.budgets
        if budget.resource != "max_latency"  # it was measured before
    )


def target_figure(target: Reached) -> tuple[str, str, str]:
    """Return a target as a figure of the report: its name, the amount allowed, the amount reached."""
    resource = next((resource for resource in RESOURCES if resource == target.name), None)
    amounts = (target.most, target.reached)
    if resource == "max_latency":
        most, reached = (format_amount(1e6 * amount, resource) for amount in amounts)
    elif resource is not None:
        most, reached = (format_amount(amount, resource) for amount in amounts)
    else:
        most, reached = (f"{amount:.3g}" for amount in amounts)
    error = "" if target.standard_error is None else f", standard error {target.standard_error:.2g}"
    return f"target {target.name} {target.asked}", f"at most {most}", reached + error


def stored_dtypes(loaded: Checkpoint, model: nn.Module) -> Dtypes:
    """Dtype of each tensor of ``model`` in the slim file: that of the tensor it was read from."""
    read, found = loaded.dtypes, {}
    for name, tensor in model.state_dict().items():
        # What is only there where tokens are left out is stored as the rest of its layer.
        alike = f"{name.rsplit('.', 2)[0]}.proj.weight"
        found[name] = read.get(name, read.get(alike, tensor.dtype))
    return found


def recorded_options(options: PruneOptions) -> dict[str, Any]:
    """Return the options that a slim file states; newer ones only where they were given."""
    changed = options.changed()
    return {
        name: value
        for name, value in options.flat().items()
        if name not in _LOCAL and (name not in _NEWER or name in changed)
    }


# Where files lie on the machine that made a slim file is nobody else's business.
_LOCAL = frozenset(
    {
        "calibration",
        "checkpoint",
        "class_map",
        "data_dir",
        "dry_run",
        "output",
        "overwrite",
        "report",
        "workers",
    }
)
_NEWER = frozenset({*TARGETS, "preserve", "runtime", "int8", "threads"})
