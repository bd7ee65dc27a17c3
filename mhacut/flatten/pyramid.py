"""timm's model interface over stages, for the families that timm does not have (PVT v1, CSWin)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import get_device_dtype
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn


class Pyramid(nn.Module):
    """Base class of models with stages of decreasing maps, [B, H, W, C].

    Subclasses implement :meth:`stage_parts`, :meth:`run_stage` and, with a final norm, :meth:`finish`.
    """

    head: nn.Module
    norm: nn.Module

    def __init__(
        self,
        dims: Sequence[int],
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check_pool(global_pool)
        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.output_fmt = "NHWC"
        self.grad_checkpointing = False
        self.num_stages = len(dims)
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**index, "module": self.stage_parts(index)[-1]}
            for index, dim in enumerate(dims)
        ]
        self.head_drop = nn.Dropout(drop_rate)

    def stage_parts(self, index: int) -> tuple[str, ...]:
        """Return the names of the modules and parameters of stage ``index`` (from 0), its blocks last."""
        raise NotImplementedError

    def run_stage(self, index: int, x: Tensor) -> Tensor:
        """Run stage ``index`` (from 0) on images [B, C, H, W] or the previous map [B, H, W, C]."""
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        return x

    def run_blocks(self, blocks: nn.Module, x: Tensor) -> Tensor:
        for block in blocks.children():
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map, [B, H / 32, W / 32, C], of images [B, channels, H, W]."""
        for index in range(self.num_stages):
            x = self.run_stage(index, x)
        return self.finish(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool:
            x = x.flatten(1, 2).mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r}: only NCHW is supported")
        wanted, last = feature_take_indices(self.num_stages, indices)
        taken: list[Tensor] = []
        end = last + 1 if stop_early else self.num_stages
        for index in range(end):
            x = self.run_stage(index, x)
            if index in wanted:
                features = self.finish(x) if norm and index == self.num_stages - 1 else x
                taken.append(features.permute(0, 3, 1, 2).contiguous())
        if intermediates_only:
            return taken
        return (self.finish(x) if end == self.num_stages else x), taken

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        wanted, last = feature_take_indices(self.num_stages, indices)
        shortened = last < self.num_stages - 1
        for index in range(last + 1, self.num_stages):
            for name in self.stage_parts(index):
                delattr(self, name)
        self.num_stages = last + 1
        # The final norm and the head are made for the channels of the last stage, which may be gone.
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.head_hidden_size = int(self.feature_info[last]["num_chs"])
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return list(wanted)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            _check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = make_head(self.num_features, num_classes, **get_device_dtype(self))
        self.head.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable


def make_head(features: int, num_classes: int, device: Any = None, dtype: Any = None) -> nn.Module:
    if num_classes == 0:
        return nn.Identity()
    return nn.Linear(features, num_classes, device=device, dtype=dtype)


def _check_pool(global_pool: str) -> None:
    if global_pool not in ("avg", ""):
        raise ValueError(f"global_pool {global_pool!r}: expected 'avg', or '' for none")
