"""SwiftFormer's additive attention: one query for all, of the queries' weighted sum, times every key.

Channel i of that sum meets channel i of the keys; what the projection of it gives at i is added to channel i
of the queries and read. So channel i of queries, keys and projection are one, called qk; there is no v.
Queries and keys have unit length over all channels: to go unnoticed a channel is zero in both, and is not
read, since the projection writes there what it reads elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from timm.models.swiftformer import EfficientAdditiveAttention
from torch import Tensor, nn

from mhacut.adapters.base import ActivationHook, Adapter, ChannelAxis, Layer, Unit
from mhacut.adapters.rows import Projection
from mhacut.plan import UnitKind


class AdditiveAdapter(Adapter):
    """timm's own forward takes any number of channels."""

    family = "attention"
    module_classes = (EfficientAdditiveAttention,)

    def heads(self, module: Any) -> int:
        """Its heads are not told apart."""
        return 1

    def describe(self, name: str, module: Any) -> Layer:
        query, key, proj, final = (
            Projection.of(module, part) for part in ("to_query", "to_key", "proj", "final")
        )
        gated = (*query.rows(), *key.rows(), final.columns())
        qk = Unit(
            name,
            "qk",
            1,
            query.writes,
            axes=(*gated, ChannelAxis("w_g", 0), *proj.rows(), proj.columns()),
            scale_axes=gated,
            hooks={"query": _of_unit_length("to_query"), "key": _of_unit_length("to_key")},
            mixing="select",
        )
        return Layer(name, self, (qk,), channel_dim=1)

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> nn.Module:
        slim: nn.Module = module
        return slim  # reads its width from its tensors


def _of_unit_length(projection: str) -> ActivationHook:
    def normalised(module: Any, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)

    return ActivationHook(projection, "output", then=normalised)


ADDITIVE_ATTENTION = (AdditiveAdapter(),)
