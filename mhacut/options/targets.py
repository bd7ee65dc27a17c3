"""Targets of ``mhacut prune``: budgets, bounds on the loss, and constraints on widths."""

from __future__ import annotations

from dataclasses import dataclass

from mhacut.errors import UsageError, option_name
from mhacut.options.option import Options, option, require

TARGETS = ("params", "size", "max_latency", "max_kl", "max_drop", "exclude", "min_width", "equal_qkv")
"""Names of targets and constraints other than FLOPs."""


@dataclass(frozen=True, kw_only=True)
class TargetOptions(Options):
    """Budgets, all of which are met, or bounds on the loss, within which the smallest model is found."""

    flops: str | tuple[str, ...] | None = option(
        None,
        "Budget: 2.0G, 600M, 2e9 or 50%. One FLOP is one multiply-accumulate, attention included. If several "
        "are given, one file is written for each.",
        panel="Result",
        metavar="BUDGET",
        repeats=True,
    )
    params: str | None = option(
        None,
        "Budget of parameters: 2.8M or 50%. Several kinds of budget can be combined; all are met.",
        panel="Result",
        metavar="BUDGET",
        once=True,
    )
    size: str | None = option(
        None,
        "Budget for the size of the written file: 6MB, 5.5MiB or 50%, in the checkpoint's dtype.",
        panel="Result",
        metavar="BUDGET",
        once=True,
    )
    max_latency: str | None = option(
        None,
        "Budget for the time per batch: 12ms, or 50% of the dense model's time. The pruned model is timed "
        "beside the dense one, on the device and under the conditions that the options of latency state.",
        panel="Result",
        metavar="TIME",
        once=True,
    )
    max_kl: float | None = option(
        None,
        "Find the smallest model whose outputs have at most this KL divergence, in nats, from those of the "
        "dense model on the held-out calibration images.",
        panel="Result",
        metavar="NATS",
        above=0,
        once=True,
    )
    max_drop: float | None = option(
        None,
        "Find the smallest model that loses at most this many points of top-1 accuracy on the labelled "
        "validation images.",
        panel="Result",
        metavar="POINTS",
        at_least=0,
        at_most=100,
        once=True,
    )

    exclude: tuple[str, ...] = option(
        (),
        "Do not prune layers or units whose names match: 'blocks.0.*', '*.attn.qk'. Can be repeated.",
        panel="Rarer options",
        metavar="PATTERN",
        repeats=True,
    )
    min_width: tuple[str, ...] = option(
        (),
        "Keep at least N channels per head, or in an MLP, where names match: 'blocks.*.mlp=256'. Can be "
        "repeated.",
        panel="Rarer options",
        metavar="PATTERN=N",
        repeats=True,
    )
    equal_qkv: bool = option(
        False,
        "Keep the q/k and v widths of each layer equal, for fused attention in TensorRT and ONNX Runtime.",
        panel="Rarer options",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.flops, tuple | list):  # one budget is one, however it was given
            several = tuple(map(str, self.flops))
            object.__setattr__(self, "flops", several if len(several) > 1 else next(iter(several), None))
            for text in several:
                require("flops", text, several.count(text) == 1, "each budget once")
        budgets = [
            name for name in ("flops", "params", "size", "max_latency") if getattr(self, name) is not None
        ]
        bounds = [name for name in ("max_kl", "max_drop") if getattr(self, name) is not None]
        if not budgets and not bounds:
            others = ", ".join(map(option_name, ("params", "size", "max_latency", "max_kl")))
            raise UsageError(
                f"{option_name('flops')} is missing. {self.options()['flops'].help} In its place you can "
                f"give {others} or {option_name('max_drop')}"
            )
        if budgets and bounds:
            bound, budget = (option_name(name, getattr(self, name)) for name in (bounds[0], budgets[0]))
            raise UsageError(
                f"{bound} searches for the smallest model, but {budget} fixes its size; leave one out"
            )

    def check_others(self, scope: str, allocation: str) -> None:
        """Check that other options allow the targets.

        Args:
            scope: what may be cut.
            allocation: how the budget is divided.

        Raises:
            UsageError: they do not.
        """
        if scope.endswith("+tokens"):
            expected = f"curves with {option_name('scope', scope)}, which compares merges by the curves"
            require("allocation", allocation, allocation == "curves", expected)
            if self.flops is None and self.max_latency is None and not self.bounds_loss:
                raise UsageError(
                    f"{option_name('scope', scope)}: expected {option_name('flops')}, "
                    f"{option_name('max_latency')}, {option_name('max_kl')} or {option_name('max_drop')}; "
                    "merging tokens changes neither the number of parameters nor the size of the file"
                )
        for name in set(TARGETS).intersection(self.changed()):
            able = ("curves",) if name == "equal_qkv" else ("curves", "uniform")
            expected = f"{' or '.join(able)} with {option_name(name, getattr(self, name))}"
            require("allocation", allocation, allocation in able, expected)

    @property
    def flops_of_each(self) -> tuple[str | None, ...]:
        """Budget of FLOPs of each file to write; None where there is none."""
        return self.flops if isinstance(self.flops, tuple) else (self.flops,)

    @property
    def several(self) -> tuple[str, ...]:
        """Several budgets of FLOPs, each for a file of its own; empty for one or none."""
        return self.flops if isinstance(self.flops, tuple) else ()

    @property
    def bounds_loss(self) -> bool:
        """Whether the smallest model within a bound on the loss is to be found."""
        return self.max_kl is not None or self.max_drop is not None
