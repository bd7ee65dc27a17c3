"""Record of a slim file: one JSON document in its metadata, read back as untrusted text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mhacut.checkpoint.identity import ARGUMENT, ModelIdentity, check_input_size
from mhacut.checkpoint.untrusted_json import kind_of, parse_json, plain_json
from mhacut.errors import CheckpointError, PlanError
from mhacut.limits import MAX_CROP_PCT, MAX_MEAN, MIN_CROP_PCT, MIN_STD, is_int, is_number
from mhacut.plan import Plan

FORMAT_VERSION = 2
"""Latest version of the format. Files without a plan of tokens are of version 1."""
METADATA_KEY = "mhacut"
"""Key of the document in the ``__metadata__`` of the safetensors file."""
MAX_RECORD_CHARS = 16 * 2**20
"""Largest document; the kept channels of the largest timm ViT take about 2 MB."""

# fmt: off
_KEYS = frozenset((
    "format_version", "architecture", "model_args", "pretrained_cfg", "basis", "preprocessing", "layers",
    "plan", "history",
))
# fmt: on
_PREPROCESSING_KEYS = frozenset(("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"))


@dataclass(frozen=True)
class SlimRecord:
    """Everything a slim file states besides its tensors."""

    identity: ModelIdentity
    """The dense model."""
    plan: Plan
    """The whole cut, in the dense model's indices, however many commands it took."""
    preprocessing: dict[str, Any]
    """Resolved ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``."""
    history: tuple[dict[str, Any], ...]
    """One entry per command that made the file, oldest first: command, options, seed, budget, FLOPs before
    and after, sha256 of what it read, versions."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "preprocessing", _checked_preprocessing(self.preprocessing))
        object.__setattr__(self, "history", tuple(plain_json(entry) for entry in self.history))
        if not all(isinstance(entry, dict) for entry in self.history):
            raise CheckpointError("history: expected one object per command")

    def to_json(self) -> str:
        """Return one line of JSON that :meth:`from_json` reads back; ``layers`` is for human readers."""
        document = {
            "format_version": FORMAT_VERSION if self.plan.tokens else 1,
            "architecture": self.identity.architecture,
            "model_args": self.identity.model_args,
            "pretrained_cfg": self.identity.pretrained_cfg,
            "basis": plan_basis(self.plan),
            "preprocessing": self.preprocessing,
            "layers": layer_widths(self.plan),
            "history": list(self.history),
            "plan": self.plan.to_json(),
            **({"tokens": self.plan.tokens.to_json()} if self.plan.tokens else {}),
        }
        return json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> SlimRecord:
        """Return the record that :meth:`to_json` wrote; the text may come from anyone.

        Raises:
            CheckpointError: it is too long, not such a document, or of a later format.
        """
        document = _document(text)
        try:
            plan = Plan.from_json(document["plan"], document.get("tokens"))
        except PlanError as error:
            raise CheckpointError(f"metadata {METADATA_KEY!r}: {error}") from error
        if document["layers"] != layer_widths(plan):
            raise CheckpointError(f"metadata {METADATA_KEY!r}: the widths in layers and the plan disagree")
        if document["basis"] != plan_basis(plan):
            raise CheckpointError(
                f"metadata {METADATA_KEY!r}: basis {document['basis']!r:.100} and the plan disagree"
            )
        if not isinstance(document["history"], list):
            raise CheckpointError(f"history: expected a list, found {kind_of(document['history'])}")
        identity = ModelIdentity(document["architecture"], document["model_args"], document["pretrained_cfg"])
        return cls(identity, plan, document["preprocessing"], tuple(document["history"]))


def _document(text: str) -> dict[str, Any]:
    """Return the object in ``text``, its version and its keys checked."""
    where = f"metadata {METADATA_KEY!r}"
    if len(text) > MAX_RECORD_CHARS:
        raise CheckpointError(
            f"{where}: at most {MAX_RECORD_CHARS} characters are allowed, found {len(text)}"
        )
    document = parse_json(text, where)
    if not isinstance(document, dict):
        raise CheckpointError(f"{where}: expected an object, found {kind_of(document)}")
    version = document.get("format_version")
    if not is_int(version) or version < 1:
        raise CheckpointError(f"format_version: expected a whole number, found {version!r:.100}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"format_version: this mhacut reads up to {FORMAT_VERSION}, the file has version {version}; "
            "upgrade mhacut (pip install -U mhacut)"
        )
    keys = _KEYS | {"tokens"} if version > 1 else _KEYS
    if set(document) != keys:
        missing, extra = sorted(keys - set(document)), sorted(set(document) - keys)
        raise CheckpointError(f"{where}: keys missing {missing!r:.200}, keys not known {extra!r:.200}")
    return document


def plan_basis(plan: Plan) -> str:
    """Return the basis of the plan's indices: ``channel``, ``principal``, or ``mixed`` where units differ."""
    found = {unit.basis for unit in plan if not unit.keeps_all}
    return "mixed" if len(found) > 1 else next(iter(found), "channel")


def layer_widths(plan: Plan) -> dict[str, dict[str, int]]:
    """Return ``heads`` and the width of each unit of every layer in the plan.

    >>> from mhacut.plan import UnitPlan
    >>> layer_widths(Plan((UnitPlan("blocks.0.attn", "qk", 3, ((0, 2), (0, 1))),)))
    {'blocks.0.attn': {'heads': 2, 'qk_width': 2}}
    """
    layers: dict[str, dict[str, int]] = {}
    for unit in plan:
        widths = layers.setdefault(unit.layer, {})
        if unit.kind != "hidden":
            widths["heads"] = unit.heads
        widths[f"{unit.kind}_width"] = unit.width
    return layers


def _checked_preprocessing(preprocessing: object) -> dict[str, Any]:
    where = "preprocessing"
    if not isinstance(preprocessing, Mapping) or set(preprocessing) != _PREPROCESSING_KEYS:
        raise CheckpointError(f"{where}: expected exactly the keys {', '.join(sorted(_PREPROCESSING_KEYS))}")
    plain: dict[str, Any] = plain_json(preprocessing)
    size, mean, std = plain["input_size"], plain["mean"], plain["std"]
    check_input_size(size, f"{where}: input_size")
    for name, values, lowest in (("mean", mean, -MAX_MEAN), ("std", std, 0.0)):
        numbers = isinstance(values, list) and len(values) in (1, size[0]) and all(map(is_number, values))
        if not numbers or not all(lowest <= value <= MAX_MEAN for value in values):
            raise CheckpointError(f"{where}: {name} is 1 or {size[0]} numbers, found {values!r:.100}")
    if not all(value >= MIN_STD for value in std):
        raise CheckpointError(f"{where}: std is at least {MIN_STD:g}, found {std!r:.100}")
    if not is_number(plain["crop_pct"]) or not MIN_CROP_PCT <= plain["crop_pct"] <= MAX_CROP_PCT:
        raise CheckpointError(
            f"{where}: crop_pct is {MIN_CROP_PCT} to {MAX_CROP_PCT}, found {plain['crop_pct']!r:.100}"
        )
    for name in ("interpolation", "crop_mode"):
        if not isinstance(plain[name], str) or not ARGUMENT.fullmatch(plain[name].replace("-", "_")):
            raise CheckpointError(f"{where}: {name} is a word, found {plain[name]!r:.100}")
    return plain
