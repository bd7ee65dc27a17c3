"""Metadata of a slim file: one JSON document, read as untrusted text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mhacut.checkpoint.identity import ModelIdentity
from mhacut.errors import CheckpointError, DataError, PlanError
from mhacut.limits import is_int
from mhacut.plan import Plan
from mhacut.runtime.files import parse_json, plain_json

FORMAT_VERSION = 2
"""Latest version of the slim file format. Version 1 files have no plan for token merging."""
METADATA_KEY = "mhacut"
PART_KEY = "mhacut_part"
SAVE_SLIM_ADVICE = "Save slim models with mhacut.save_model(model, FILE, like=SLIM_FILE), which adds the plan"
_KEYS = {"architecture", "model_args", "pretrained_cfg", "preprocessing", "plan", "history"}


@dataclass(frozen=True)
class SlimRecord:
    identity: ModelIdentity
    plan: Plan
    preprocessing: dict[str, Any]
    """Values of ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct`` and ``crop_mode``."""
    history: tuple[dict[str, Any], ...]
    """One entry per mhacut command that changed the file, oldest first: options, budget, versions."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "preprocessing", _checked_preprocessing(self.preprocessing))
        history = plain_json(self.history)
        if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
            raise CheckpointError("history: expected a list with one object per command")
        object.__setattr__(self, "history", tuple(history))

    def to_json(self) -> str:
        bases = {unit.basis for unit in self.plan if not unit.keeps_all}
        document = {
            # The oldest sufficient version, so that older releases read most files.
            "format_version": FORMAT_VERSION if self.plan.tokens else 1,
            "architecture": self.identity.architecture,
            "model_args": self.identity.model_args,
            "pretrained_cfg": self.identity.pretrained_cfg,
            "basis": bases.pop() if len(bases) == 1 else "mixed" if bases else "channel",
            "preprocessing": self.preprocessing,
            "layers": _layer_widths(self.plan),  # for people, like basis; only the plan is read
            "history": list(self.history),
            "plan": self.plan.to_json(),
            **({"tokens": self.plan.tokens.to_json()} if self.plan.tokens else {}),
        }
        return json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> SlimRecord:
        where = f"metadata {METADATA_KEY!r}"
        document = parse_json(text, where)
        version = document.get("format_version")
        if not is_int(version) or version < 1:
            raise CheckpointError(f"format_version: expected a number from 1, found {version!r:.100}")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"format_version: expected at most {FORMAT_VERSION}, found {version}. Upgrade mhacut: "
                "pip install -U mhacut"
            )
        if missing := sorted(_KEYS - document.keys()):
            raise CheckpointError(f"{where}: the file is incomplete: missing keys {', '.join(missing)}")
        try:
            plan = Plan.from_json(document["plan"], document.get("tokens"))
        except PlanError as error:
            raise CheckpointError(f"{where}: {error}") from error
        identity = ModelIdentity(document["architecture"], document["model_args"], document["pretrained_cfg"])
        return cls(identity, plan, document["preprocessing"], document["history"])


def _layer_widths(plan: Plan) -> dict[str, dict[str, int]]:
    layers: dict[str, dict[str, int]] = {}
    for unit in plan:
        widths = layers.setdefault(unit.layer, {})
        if unit.kind != "hidden":
            widths["heads"] = unit.heads
        widths[f"{unit.kind}_width"] = unit.width
    return layers


def _checked_preprocessing(preprocessing: object) -> dict[str, Any]:
    from mhacut.data.preprocessing import Preprocessing  # imports torch

    if not isinstance(preprocessing, Mapping):
        raise CheckpointError(f"preprocessing: expected an object, found {preprocessing!r:.80}")
    try:
        plain: dict[str, Any] = plain_json(Preprocessing(**preprocessing).to_json())
    except (DataError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"preprocessing: {error!s:.200}") from None
    return plain
