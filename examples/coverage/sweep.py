"""Cuts every architecture of timm, and every FLatten Transformer, without weights.

    python examples/coverage/sweep.py [PATTERN] [--json FILE]

Each is built on torch's meta device. Of those that mhacut can cut: the plan that keeps everything changes no
name and no shape; a random plan that halves every unit is applied; every tensor it names becomes narrower;
the slim model runs and gives the dense model's shape; it costs what mhacut's table promised, by fvcore's
count; a file with its record and no weights is read back to the same shapes. And no module outside the
layers that mhacut names multiplies activations, so that nothing is left whole in silence.

Prints how much of timm is covered, every refusal with its reason, and every failure. Exits with 1 if there
is one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import timm
import torch
from trial import Outcome, examine, reason_of

from mhacut._version import __version__
from mhacut.commands.models import architectures

REPRESENTATIVES = Path(__file__).with_name("representatives.txt")


def main(arguments: Sequence[str] | None = None) -> int:
    asked = build_parser().parse_args(arguments)
    chosen = architectures(asked.pattern)
    if not chosen:
        print(f"{asked.pattern!r}: no model in timm has a name like this", file=sys.stderr)
        return 2
    outcomes = []
    for done, (name, tags) in enumerate(chosen.items(), 1):
        outcome = examine(name, tags)
        outcomes.append(outcome)
        verdict = "FAILED" if outcome.failures else "ok"
        print(f"{done}/{len(chosen)} {name} {outcome.seconds:.1f} s {verdict}", file=sys.stderr, flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(as_document(outcomes), indent=1) + "\n", encoding="utf-8")
    if asked.representatives:
        names = sorted(representatives(outcomes))
        REPRESENTATIVES.write_text("\n".join(names) + "\n", encoding="utf-8")
    print(as_text(outcomes))
    return 1 if any(outcome.failures for outcome in outcomes) else 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pattern", nargs="?", default="*", help="of names, as for timm.list_models")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every outcome")
    parser.add_argument(
        "--representatives", action="store_true", help=f"write {REPRESENTATIVES.name} anew, for the tests"
    )
    return parser


def representatives(outcomes: Iterable[Outcome]) -> list[str]:
    """The smallest architecture of each signature, models without attention aside."""
    smallest: dict[tuple[object, ...], Outcome] = {}
    for outcome in outcomes:
        if outcome.entry is None or outcome.entry.transformer:
            other = smallest.setdefault(outcome.signature, outcome)
            if (outcome.parameters, outcome.architecture) < (other.parameters, other.architecture):
                smallest[outcome.signature] = outcome
    return [outcome.architecture for outcome in smallest.values()]


def as_text(outcomes: Sequence[Outcome]) -> str:
    attending = [outcome for outcome in outcomes if outcome.entry is None or outcome.entry.transformer]
    cut = [outcome for outcome in attending if outcome.entry is not None and outcome.entry.refusal is None]
    attention = [outcome for outcome in cut if {"qk", "v"} & set(outcome.entry.kinds)]
    both = [outcome for outcome in cut if {"qk", "v"} <= set(outcome.entry.kinds)]
    every = [outcome for outcome in both if not outcome.whole_attention]
    rows = [
        ("with attention", attending),
        ("something is cut", cut),
        ("attention is cut", attention),
        ("q/k and v are cut", both),
        ("q/k and v of every layer are cut", every),
    ]
    lines = [f"mhacut {__version__}, timm {timm.__version__}, torch {torch.__version__}", ""]
    lines += ["| | architectures | pretrained tags |", "|---|---|---|"]
    lines += [f"| {what} | {len(those)} | {sum(len(one.tags) for one in those)} |" for what, those in rows]
    lines += ["", f"{len(outcomes) - len(attending)} architectures have no attention."]
    lines += _grouped("Refused", [(_refusal(one), one) for one in attending if one not in cut])
    lines += _grouped("Left whole in part", [(reason, one) for one in cut for reason in _reasons(one)])
    lines += _grouped("Noted", [(note, one) for one in outcomes for note in one.notes])
    failed = [f"{one.architecture}: {failure}" for one in outcomes for failure in one.failures]
    lines += ["", f"Failures: {len(failed)}", *failed]
    return "\n".join(lines)


def _refusal(outcome: Outcome) -> str:
    if outcome.entry is None:
        return "cannot be built"
    refusal = outcome.entry.refusal or ""
    return refusal.partition("; ")[0].partition(" (first at")[0]


def _reasons(outcome: Outcome) -> list[str]:
    return list(map(reason_of, outcome.entry.not_prunable)) if outcome.entry else []


def _grouped(title: str, pairs: Sequence[tuple[str, Outcome]]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for reason, outcome in pairs:
        groups.setdefault(reason, []).append(outcome.architecture)
    lines = ["", f"{title}: {len({one.architecture for _, one in pairs})} architectures"]
    return lines + [f"- {reason}: {len(names)}: {', '.join(names)}" for reason, names in groups.items()]


def as_document(outcomes: Sequence[Outcome]) -> dict[str, object]:
    versions = {"mhacut": __version__, "timm": timm.__version__, "torch": torch.__version__}
    return {"versions": versions, "architectures": [asdict(outcome) for outcome in outcomes]}


if __name__ == "__main__":
    sys.exit(main())
