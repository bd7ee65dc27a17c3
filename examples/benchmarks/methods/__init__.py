"""The methods that ``compare.py`` sets side by side, by name; see :data:`METHODS`.

This module imports the standard library only, so that the comparing process stays small: on Linux a child
starts with its parent's peak memory.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from methods import ablation
from methods.method import Method, Sees

_OWN_IMAGES = {"balanced": None, "fast": 128, "best": 1024}
"""Calibration images of an effort that is not compared on those of the other methods."""


def _mhacut() -> Iterable[Method]:
    data: dict[str, tuple[Sees, tuple[str, ...]]] = {
        "nodata": ("nothing", ()),
        "unlabelled": ("images", ("--no-labels",)),
        "labelled": ("labelled images", ()),
    }
    for told, (sees, data_flags) in data.items():
        for basis in ("auto", "channel", "principal"):
            for effort, images in _OWN_IMAGES.items():
                own = () if images is None else ("--calibration-images", str(images))
                yield Method(
                    f"mhacut-{told}-{basis}-{effort}",
                    f"mhacut, {'no data' if told == 'nodata' else told}, {basis}, {effort}"
                    + (f" ({images} images)" if images else ""),
                    sees,
                    "",
                    {
                        "flags": (
                            *("--scope", "attention+mlp", *data_flags),
                            *("--set", f"basis={basis}", "--effort", effort, *own),
                        )
                    },
                    default=(basis, effort) == ("auto", "balanced"),
                )
    yield from _mhacut_tokens()


def _mhacut_tokens() -> Iterable[Method]:
    """Rows of mhacut with tokens in the budget too, and with those kept that no output reads."""
    rows: dict[str, tuple[str, tuple[str, ...]]] = {
        "plain": ("by default", ()),
        "tokens": ("tokens too", ("--scope", "attention+mlp+tokens")),
        "dead": ("dead tokens kept", ("--scope", "attention+mlp", "--keep-dead-tokens")),
        "tokens-dead": (
            "tokens too, dead ones kept",
            ("--scope", "attention+mlp+tokens", "--keep-dead-tokens"),
        ),
    }
    for name, (title, flags) in rows.items():
        for effort, images in _OWN_IMAGES.items():
            own = () if images is None else ("--calibration-images", str(images))
            yield Method(
                f"mhacut-{name}-{effort}",
                f"mhacut, unlabelled, {title}, {effort}" + (f" ({images} images)" if images else ""),
                "images",
                "",
                {"flags": ("--no-labels", "--effort", effort, *own, *flags)},
                default=False,
            )


def _torch_pruning() -> Iterable[Method]:
    criteria: dict[str, tuple[str, Sees]] = {
        "l1": ("L1", "nothing"),
        "l2": ("L2", "nothing"),
        "taylor": ("Taylor", "labelled images"),
        "hessian": ("Hessian", "labelled images"),
    }
    for criterion, (title, sees) in criteria.items():
        for spread in ("uniform", "global", "isomorphic"):
            yield Method(
                f"tp-{criterion}-{spread}",
                f"Torch-Pruning {title}, {spread}",
                sees,
                "torch_pruning_timm",
                {"criterion": criterion, "spread": spread},
            )


def _tokens() -> Iterable[Method]:
    """Rivals that merge tokens."""
    yield Method("tome", "ToMe, untrained (own reference)", "nothing", "tome")
    yield Method(
        "tome-tp",
        "Torch-Pruning Taylor, uniform, to 90 %, then ToMe",
        "labelled images",
        "tome",
        {"channels": {"criterion": "taylor", "spread": "uniform", "share": 0.9}},
    )


METHODS = {
    method.name: method
    for method in (
        *_mhacut(),
        *ablation.methods(),
        *_torch_pruning(),
        Method("corp", "CORP (own reference)", "images", "corp"),
        Method("vbp", "VBP (own reference)", "images", "vbp"),
        Method("snp", "SNP criterion (own reference)", "images", "snp"),
        *_tokens(),
    )
}
"""Every method, mhacut's first."""


def chosen(patterns: Iterable[str]) -> list[Method]:
    """The methods that match, in the order of the patterns; the default ones without patterns.

    >>> [method.name for method in chosen(["vbp", "tp-l1-*"])]
    ['vbp', 'tp-l1-uniform', 'tp-l1-global', 'tp-l1-isomorphic']

    Raises:
        ValueError: a pattern that matches none.
    """
    found: dict[str, Method] = {}
    patterns = list(patterns)
    if not patterns:
        return [method for method in METHODS.values() if method.default]
    for pattern in patterns:
        names = fnmatch.filter(METHODS, pattern)
        if not names:
            raise ValueError(f"--methods {pattern}: none of {', '.join(METHODS)}")
        found |= {name: METHODS[name] for name in names}
    return list(found.values())
