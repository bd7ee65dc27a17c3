"""``mhacut prune`` with one ingredient changed at a time, for ``ablation.py``."""

from __future__ import annotations

from collections.abc import Iterable

from methods.method import Method

PAPER = ("--method", "paper")
"""The ingredients of arXiv 2405.20867 and nothing else; scales are trained where there is no repair."""
PLAIN = ("--allocation", "uniform", "--basis", "channel", "--no-repair", "--no-reweight", "--heal-steps", "0")
"""Widths the same everywhere, and of each head the channels without which least goes."""
SEARCH = ("--allocation", "indicator", "--selection", "indicator")
BARE = ("--no-similarity", "--init", "uniform", "--no-score-adjustment")
"""The learnable search without what the paper adds to it."""

_FULL = {
    "full": ("the full method", ()),
    "full-channel": ("original channels only", ("--basis", "channel")),
    "full-principal": ("principal channels wherever exact", ("--basis", "principal")),
    "full-uniform": ("uniform widths", ("--allocation", "uniform")),
    "full-indicator": ("widths by learnable search", ("--allocation", "indicator")),
    "full-no-repair": ("no repair", ("--no-repair", "--no-reweight")),
    "full-no-token-weights": ("tokens all alike", ("--no-token-weights",)),
    "full-no-heal": ("no healing", ("--heal-steps", "0")),
    "full-heal": ("healing with 150 steps", ("--heal-steps", "150")),
    "full-tokens": ("tokens merged too", ("--scope", "attention+mlp+tokens")),
    "full-dead": ("dead tokens kept", ("--keep-dead-tokens",)),
    "full-128": ("128 images", ("--calibration-images", "128")),
    "full-512": ("512 images, or all there are", ("--calibration-images", "512")),
    "full-64": ("64 images", ("--calibration-images", "64")),
    "full-best": ("the effort `best`", ("--effort", "best")),
    "full-gains": ("reweight gains after the repair", ("--gain-steps", "40")),
}
_PAPER = {
    "paper": ("the paper's ingredients", ()),
    "paper-no-similarity": ("no similarity weight", ("--no-similarity",)),
    "paper-no-init": ("no attention-difference start", ("--init", "uniform")),
    "paper-no-adjustment": ("no score adjustment while training", ("--no-score-adjustment",)),
    "paper-no-reweight": ("no reweight", ("--no-reweight",)),
}
_ALONE = {
    "plain": ("none of them: uniform widths", ()),
    "plain-repair": ("repair alone", ("--repair",)),
    "plain-principal": ("principal basis alone", ("--basis", "principal")),
    "plain-curves": ("sensitivity curves alone", ("--allocation", "curves")),
    "plain-indicator": ("learnable search alone", (*SEARCH, *BARE)),
    "plain-similarity": ("learnable search and similarity weight", (*SEARCH, *BARE, "--similarity")),
    "plain-init": (
        "learnable search and attention-difference start",
        (*SEARCH, *BARE, "--init", "attention-difference"),
    ),
    "plain-adjustment": ("learnable search and score adjustment", (*SEARCH, *BARE, "--score-adjustment")),
    "plain-reweight": ("reweight alone", ("--reweight",)),
}


def methods() -> Iterable[Method]:
    for base, rows in (((), _FULL), (PAPER, _PAPER), (PLAIN, _ALONE)):
        for name, (title, flags) in rows.items():
            # Of a flag given twice, the command line takes the later one.
            yield Method(
                f"ablation-{name}",
                title,
                "images",
                "",
                {"flags": ("--no-labels", "--scope", "attention+mlp", *base, *flags)},
                default=False,
            )
