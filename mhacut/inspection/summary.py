"""Summary of an inspection in one line."""

from __future__ import annotations

from mhacut.budget import format_flops
from mhacut.inspection.layers import BY_WEIGHTS, Inspection
from mhacut.plan import UNIT_KINDS, TokenPlan, UnitKind


def summary(inspection: Inspection) -> str:
    """Return how much the model spends on attention, how much of it was kept, and how redundant it is.

    ``attention 36 % of 4.61G; 99 % of the energy is in 61 % of the channels of qk, 84 % of v``
    """
    spent = sum(layer.share for layer in inspection.layers if layer.heads is not None)
    parts = [f"attention {100 * spent:.0f} % of {format_flops(inspection.flops)}"]
    if inspection.slim:
        kept = {kind: kept_share(inspection, kind) for kind in UNIT_KINDS}
        shares = [f"{100 * share:.0f} % of {kind}" for kind, share in kept.items() if share is not None]
        parts.append("kept " + ", ".join(shares))
    parts += _tokens(inspection.tokens)
    useful = {kind: useful_share(inspection, kind) for kind in UNIT_KINDS}
    shares = [f"{100 * share:.0f} % of {kind}" for kind, share in useful.items() if share is not None]
    if shares:
        by = " (by weights alone)" if inspection.judged_by == BY_WEIGHTS else ""
        parts.append(f"99 % of the energy is in {', '.join(shares)}{by}")
    return "; ".join(parts)


def _tokens(tokens: TokenPlan) -> list[str]:
    """Describe the tokens that are merged or left out."""
    parts = []
    if tokens.merged:
        parts.append(f"tokens merged per block: {', '.join(map(str, tokens.merged))}")
    if tokens.read is not None:
        shown = "token" if tokens.read == 1 else f"{tokens.read} tokens"
        parts.append(f"the last block computes only the {shown} that the classifier reads")
    return parts


def useful_share(inspection: Inspection, kind: UnitKind) -> float | None:
    """Share of the principal channels of one kind, in 0..1, that hold 99 % of the energy of their head.

    None if it is not known.
    """
    units = [layer.units[kind] for layer in inspection.layers if kind in layer.units]
    width = sum(unit.now * len(unit.heads) for unit in units)
    return sum(head.rank99 for unit in units for head in unit.heads) / width if width else None


def kept_share(inspection: Inspection, kind: UnitKind) -> float | None:
    """Share of the dense model's channels of one kind that are left, in 0..1; None if it has none of them."""
    units = [layer.units[kind] for layer in inspection.layers if kind in layer.units]
    dense = sum(unit.dense for unit in units)
    return sum(unit.now for unit in units) / dense if dense else None
