"""``mhacut prune`` with one ingredient changed at a time, for ``ablation.py``."""

from __future__ import annotations

from collections.abc import Iterable

from methods.method import Method

PAPER = ("--method", "paper")
"""The ingredients of arXiv 2405.20867 and nothing else; scales are trained where there is no repair."""
PLAIN = (
    "--set",
    "allocation=uniform",
    "--set",
    "basis=channel",
    "--set",
    "repair=false",
    "--set",
    "reweight=false",
    "--set",
    "heal_steps=0",
)
"""Widths the same everywhere, and of each head the channels without which least goes."""
SEARCH = ("--set", "allocation=indicator", "--set", "selection=indicator")
BARE = ("--set", "similarity=false", "--set", "init=uniform", "--set", "score_adjustment=false")
"""The learnable search without what the paper adds to it."""

_FULL = {
    "full": ("the full method", ()),
    "full-channel": ("original channels only", ("--set", "basis=channel")),
    "full-principal": ("principal channels wherever exact", ("--set", "basis=principal")),
    "full-uniform": ("uniform widths", ("--set", "allocation=uniform")),
    "full-indicator": ("widths by learnable search", ("--set", "allocation=indicator")),
    "full-no-repair": ("no repair", ("--set", "repair=false", "--set", "reweight=false")),
    "full-no-token-weights": (
        "tokens all alike",
        (
            "--set",
            "token_weights=false",
        ),
    ),
    "full-no-heal": ("no healing", ("--set", "heal_steps=0")),
    "full-heal": ("healing with 150 steps", ("--set", "heal_steps=150")),
    "full-tokens": ("tokens merged too", ("--scope", "attention+mlp+tokens")),
    "full-dead": ("dead tokens kept", ("--keep-dead-tokens",)),
    "full-128": ("128 images", ("--calibration-images", "128")),
    "full-512": ("512 images, or all there are", ("--calibration-images", "512")),
    "full-64": ("64 images", ("--calibration-images", "64")),
    "full-best": ("the effort `best`", ("--effort", "best")),
    "full-gains": ("reweight gains after the repair", ("--set", "gain_steps=40")),
}
_PAPER = {
    "paper": ("the paper's ingredients", ()),
    "paper-no-similarity": (
        "no similarity weight",
        (
            "--set",
            "similarity=false",
        ),
    ),
    "paper-no-init": ("no attention-difference start", ("--set", "init=uniform")),
    "paper-no-adjustment": (
        "no score adjustment while training",
        (
            "--set",
            "score_adjustment=false",
        ),
    ),
    "paper-no-reweight": (
        "no reweight",
        (
            "--set",
            "reweight=false",
        ),
    ),
}
_ALONE = {
    "plain": ("none of them: uniform widths", ()),
    "plain-repair": (
        "repair alone",
        (
            "--set",
            "repair=true",
        ),
    ),
    "plain-principal": ("principal basis alone", ("--set", "basis=principal")),
    "plain-curves": ("sensitivity curves alone", ("--set", "allocation=curves")),
    "plain-indicator": ("learnable search alone", (*SEARCH, *BARE)),
    "plain-similarity": (
        "learnable search and similarity weight",
        (*SEARCH, *BARE, "--set", "similarity=true"),
    ),
    "plain-init": (
        "learnable search and attention-difference start",
        (*SEARCH, *BARE, "--set", "init=attention-difference"),
    ),
    "plain-adjustment": (
        "learnable search and score adjustment",
        (*SEARCH, *BARE, "--set", "score_adjustment=true"),
    ),
    "plain-reweight": (
        "reweight alone",
        (
            "--set",
            "reweight=true",
        ),
    ),
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
