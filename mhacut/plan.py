"""Pruning plan: the channels that stay and the tokens that merge, as validated data without tensors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from mhacut.errors import PlanError
from mhacut.limits import is_int

Basis = Literal["channel", "principal"]
LayerFamily = Literal["attention", "mlp"]
UnitKind = Literal["qk", "v", "hidden"]
UNIT_KINDS: tuple[UnitKind, ...] = get_args(UnitKind)
UnitKey = tuple[str, UnitKind]
"""Layer name and kind (qk, v or hidden) of prunable channels."""

_UNIT_KEYS = {"layer", "kind", "dense_width", "kept"}
_OPTIONAL_KEYS = {"basis", "unshared"}
_TOKEN_KEYS = {"read", "merged", "rule", "copied", "outside", "patches", "grid"}
MERGE_RULE, COPY_RULE, GRID_RULE = "weights", "checkerboard", "grid"
"""Names of the token merging rules in files. ``checkerboard`` and ``grid`` copy merged tokens back to their
patches."""
Unmerge = bool | Literal["rows"]
"""Whether merged tokens are copied back to their patches. ``"rows"`` is for older files, which match tokens
in raster order."""
# Plans come from untrusted files, so that only module names are looked up in a model.
_LAYER_NAME = re.compile(r"\w+(\.\w+)*")


@dataclass(frozen=True)
class UnitPlan:
    """Channels to keep in a unit (q/k, v or hidden channels of a layer).

    All heads keep the same number of channels, possibly with different indices. An MLP counts as 1 head.
    """

    layer: str
    """Module name in the model: ``blocks.0.attn``."""
    kind: UnitKind
    dense_width: int
    """Channels per head before the cut."""
    kept: tuple[tuple[int, ...], ...]
    """For each head, the ascending indices of the kept channels in ``range(dense_width)``."""
    basis: Basis = "channel"
    """Meaning of the channel indices: channels of the model (``channel``), or principal components, strongest
    first (``principal``)."""
    unshared: bool = False
    """Whether each head gets a copy of tensors that heads share, so that heads can keep different
    channels."""

    def __post_init__(self) -> None:
        where = f"plan of {self.layer!r} ({self.kind})"
        if not _LAYER_NAME.fullmatch(self.layer):
            raise PlanError(f"{where}: expected a layer name such as blocks.0.attn")
        if self.kind not in UNIT_KINDS:
            raise PlanError(f"{where}: expected the kind to be 1 of {', '.join(UNIT_KINDS)}")
        if self.basis not in get_args(Basis):
            raise PlanError(
                f"{where}: expected the basis {' or '.join(get_args(Basis))}, found {self.basis!r}"
            )
        if not self.kept:
            raise PlanError(f"{where}: expected at least 1 head, found none")
        width = len(self.kept[0])
        if width == 0:
            raise PlanError(f"{where}: expected at least 1 kept channel per head, found none")
        for head, channels in enumerate(self.kept):
            if len(channels) != width:
                raise PlanError(
                    f"{where}: every head keeps the same number of channels, "
                    f"but head 0 keeps {width} and head {head} keeps {len(channels)}"
                )
            # Ascending: a set of channels is written in one way, and slicing keeps their order.
            if any(a >= b for a, b in itertools.pairwise(channels)):
                raise PlanError(f"{where}: kept channels of head {head} are not strictly ascending")
            if channels[0] < 0 or channels[-1] >= self.dense_width:
                raise PlanError(
                    f"{where}: kept channels of head {head} must lie in 0..{self.dense_width - 1}, "
                    f"found {channels[0]}..{channels[-1]}"
                )

    @property
    def key(self) -> UnitKey:
        return self.layer, self.kind

    @property
    def heads(self) -> int:
        return len(self.kept)

    @property
    def width(self) -> int:
        return len(self.kept[0])

    @property
    def keeps_all(self) -> bool:
        return self.width == self.dense_width

    def after(self, earlier: UnitPlan) -> UnitPlan:
        """Combine this cut with an ``earlier`` cut of the same unit. Indices refer to the dense layer."""
        if earlier.key != self.key or earlier.heads != self.heads or earlier.width != self.dense_width:
            raise PlanError(
                f"plan of {self.layer!r} ({self.kind}): expected {earlier.heads} heads of {earlier.width} "
                f"channels left by the earlier cut, found {self.heads} heads of {self.dense_width}"
            )
        # Principal components mix channels, so they have no indices in the dense layer.
        if self.basis == "principal" and not self.keeps_all:
            return UnitPlan(
                self.layer, self.kind, earlier.dense_width, self.kept, "principal", earlier.unshared
            )
        # Indices of this plan refer to the channels left by the earlier plan; translate to the dense layer.
        kept = tuple(
            tuple(before[channel] for channel in now)
            for before, now in zip(earlier.kept, self.kept, strict=True)
        )
        unshared = earlier.unshared or self.unshared
        return UnitPlan(self.layer, self.kind, earlier.dense_width, kept, earlier.basis, unshared)


@dataclass(frozen=True)
class TokenPlan:
    """Tokens that a model leaves out or merges, counted on the dense model. By default, all tokens stay."""

    output_tokens: int | None = None
    """Number of first tokens that the last block computes, if the head reads only these. None: all tokens."""
    merged: tuple[int, ...] = ()
    """Number of tokens that each block merges, in the order of blocks; empty without merging."""
    unmerge: Unmerge = False
    """Whether merged tokens are copied back to their patches, so that every patch has output features."""
    outside: tuple[int, int] | None = field(default=None, compare=False)
    """Numbers of tokens before and after the patches, such as class tokens, which never merge. None if the
    class of the model determines them."""
    patches: int | None = field(default=None, compare=False)
    """Number of patches of the image size that the plan was made for. At other sizes, each block merges the
    same share of its tokens. None in older files: the numbers of merged tokens apply to all sizes."""
    grid: tuple[int, int] | None = field(default=None, compare=False)
    """Rows and columns of patches of the image size that the plan was made for, if merges leave a smaller
    grid within each window. None: tokens merge all over the image."""

    def __post_init__(self) -> None:
        if self.output_tokens is not None and self.output_tokens < 1:
            raise PlanError(f"token plan: `read` must be at least 1, found {self.output_tokens}")
        if any(merged < 0 for merged in self.merged):
            raise PlanError("token plan: numbers of merged tokens must be at least 0")
        if not any(self.merged):
            object.__setattr__(self, "merged", ())
            object.__setattr__(self, "unmerge", False)
            object.__setattr__(self, "outside", None)
        if self.patches is not None and self.patches < 1:
            raise PlanError(f"token plan: `patches` must be at least 1, found {self.patches}")
        if self.unmerge and self.output_tokens is not None:
            raise PlanError("token plan: expected `copied` or `read`, found both")
        if self.grid is not None and (min(self.grid) < 1 or (self.merged and not self.unmerge)):
            raise PlanError("token plan: `grid` must be 2 positive numbers, beside `copied`")

    def __bool__(self) -> bool:
        return self.output_tokens is not None or bool(self.merged)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a JSON object that :meth:`from_json` reads.

        >>> TokenPlan(output_tokens=1, merged=(0, 8)).to_json()
        {'read': 1, 'merged': [0, 8], 'rule': 'weights'}
        """
        read = {} if self.output_tokens is None else {"read": self.output_tokens}
        rule = GRID_RULE if self.grid else COPY_RULE if self.unmerge is True else MERGE_RULE
        merged = {"merged": list(self.merged), "rule": rule} if self.merged else {}
        outside = {} if self.outside is None else {"outside": list(self.outside)}
        patches = {"patches": self.patches} if self.merged and self.patches is not None else {}
        grid = {"grid": list(self.grid)} if self.merged and self.grid else {}
        return {**read, **merged, **({"copied": True} if self.unmerge else {}), **outside, **patches, **grid}

    @classmethod
    def from_json(cls, document: object) -> TokenPlan:
        """Return the plan that :meth:`to_json` wrote. ``document`` may come from an untrusted file."""
        if not isinstance(document, Mapping) or not set(document) <= _TOKEN_KEYS:
            raise PlanError(f"token plan: allowed keys are {', '.join(sorted(_TOKEN_KEYS))}")
        read, merged = document.get("read"), document.get("merged", [])
        copied, outside = document.get("copied", False), document.get("outside")
        for key in ("read", "patches"):
            if key in document and not is_int(document[key]):
                raise PlanError(f"token plan: `{key}` must be a whole number")
        if not isinstance(merged, list) or not _all_int(merged):
            raise PlanError("token plan: `merged` must be a list of whole numbers, 1 per block")
        if not isinstance(copied, bool):
            raise PlanError("token plan: `copied` must be true or false")
        grid = document.get("grid")
        for key, pair in (("outside", outside), ("grid", grid)):
            if pair is not None and not (isinstance(pair, list) and len(pair) == 2 and _all_int(pair)):
                raise PlanError(f"token plan: `{key}` must be a list of 2 whole numbers")
        # Merged by another rule, the same numbers would give other logits, without an error.
        rule = document.get("rule")
        known = GRID_RULE if grid is not None else COPY_RULE if copied else MERGE_RULE
        if any(merged) and rule != known and (grid is not None or rule != MERGE_RULE):
            raise PlanError(
                f"token plan: this version of mhacut merges by the rule {known!r}, found {rule!r}; open the "
                "file with the version of mhacut that wrote it, or prune the dense model again"
            )
        in_rows = copied and rule == MERGE_RULE
        unmerge: Unmerge = "rows" if in_rows else copied
        pairs = (None if pair is None else (pair[0], pair[1]) for pair in (outside, grid))
        kept, places = pairs
        return cls(cast("int | None", read), tuple(merged), unmerge, kept, document.get("patches"), places)


@dataclass(frozen=True)
class Plan:
    """Channels to keep in a model, and tokens to merge.

    Units without a :class:`UnitPlan` keep all channels.
    """

    units: tuple[UnitPlan, ...]
    tokens: TokenPlan = TokenPlan()
    """Plan of merged tokens, and of tokens that the last block leaves out."""

    def __post_init__(self) -> None:
        seen: set[UnitKey] = set()
        for unit in self.units:
            if unit.key in seen:
                raise PlanError(f"plan names {unit.layer!r} ({unit.kind}) twice")
            seen.add(unit.key)

    def __iter__(self) -> Iterator[UnitPlan]:
        return iter(self.units)

    def by_layer(self) -> dict[str, dict[UnitKind, UnitPlan]]:
        layers: dict[str, dict[UnitKind, UnitPlan]] = {}
        for unit in self.units:
            layers.setdefault(unit.layer, {})[unit.kind] = unit
        return layers

    def widths(self) -> dict[UnitKey, int]:
        return {unit.key: unit.width for unit in self.units}

    def after(self, earlier: Plan) -> Plan:
        """Combine this plan with an ``earlier`` plan of the same model, in the indices of the dense model.

        Units that this plan does not name keep the cut of ``earlier``. The result has the token plan of this
        plan.
        """
        # Tokens are counted on the dense model, so a later plan of tokens replaces the earlier one.
        before = {unit.key: unit for unit in earlier}
        now = {unit.key: unit for unit in self}
        merged = [now[key].after(unit) if key in now else unit for key, unit in before.items()]
        merged += [unit for key, unit in now.items() if key not in before]
        return Plan(tuple(merged), self.tokens)

    def to_json(self) -> list[dict[str, Any]]:
        """Return the unit plans as a list of JSON objects that :meth:`from_json` reads, without ``tokens``.

        >>> plan = Plan((UnitPlan("blocks.0.mlp", "hidden", 4, ((0, 2),)),))
        >>> plan.to_json()
        [{'layer': 'blocks.0.mlp', 'kind': 'hidden', 'dense_width': 4, 'kept': [[0, 2]], 'basis': 'channel'}]
        >>> Plan.from_json(plan.to_json()) == plan
        True
        """
        return [
            {
                "layer": unit.layer,
                "kind": unit.kind,
                "dense_width": unit.dense_width,
                "kept": [list(channels) for channels in unit.kept],
                "basis": unit.basis,
                **({"unshared": True} if unit.unshared else {}),
            }
            for unit in self.units
        ]

    @classmethod
    def from_json(cls, document: object, tokens: object = None) -> Plan:
        """Return the plan that :meth:`to_json` wrote. Both documents may come from an untrusted file.

        Args:
            document: list of unit plans, from :meth:`to_json`.
            tokens: token plan, from :meth:`TokenPlan.to_json`; None without a token plan.

        Raises:
            PlanError: ``document`` or ``tokens`` is not a valid plan.
        """
        if not isinstance(document, list):
            raise PlanError(f"plan: expected a list of unit plans, found {type(document).__name__}")
        units = tuple(_unit_from_json(entry) for entry in document)
        return cls(units, TokenPlan() if tokens is None else TokenPlan.from_json(tokens))


def _unit_from_json(entry: object) -> UnitPlan:
    if not isinstance(entry, Mapping) or not _UNIT_KEYS <= set(entry) <= _UNIT_KEYS | _OPTIONAL_KEYS:
        raise PlanError(
            f"unit plan: expected the keys {', '.join(sorted(_UNIT_KEYS))}, with "
            f"{', '.join(sorted(_OPTIONAL_KEYS))} as optional keys"
        )
    layer, kind, dense_width, kept = entry["layer"], entry["kind"], entry["dense_width"], entry["kept"]
    basis = entry.get("basis", "channel")  # the first files named none
    unshared = entry.get("unshared", False)
    if not all(isinstance(text, str) for text in (layer, kind, basis)) or not is_int(dense_width):
        raise PlanError("unit plan: layer, kind and basis must be text, dense_width a whole number")
    if not isinstance(unshared, bool):
        raise PlanError(f"plan of {layer!r}: `unshared` must be true or false")
    if not isinstance(kept, list) or not all(isinstance(row, list) and _all_int(row) for row in kept):
        raise PlanError(f"plan of {layer!r}: `kept` must be a list of channel indices for each head")
    rows = tuple(tuple(row) for row in kept)
    return UnitPlan(layer, cast(UnitKind, kind), dense_width, rows, cast(Basis, basis), unshared)


def _all_int(values: Iterable[object]) -> bool:
    return all(is_int(value) for value in values)
