"""Models of other libraries, pruned in place with random weights: what is cut, what stays, what opens again.

    python examples/coverage/any_code.py [PATTERN] [--markdown FILE]

Needs torchvision and `pip install -e '.[interop,onnx]'`. Exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mhacut
from mhacut.errors import MhacutError
from mhacut.plan import Plan
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.slice import cut

PLAIN = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 4,
}
PYRAMID = {"hidden_sizes": [32, 32, 64, 64], "num_attention_heads": [1, 2, 2, 2], "depths": [1, 1, 1, 1]}
SIDES = {"image_size": [32, 32], "patch_size": [8, 8]}
WINDOWS = {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4]}
HIERA = {"embed_dim": 32, "image_size": [64, 64], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}
SAM = {
    "output_channels": 16,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 64,
    "image_size": 64,
    "patch_size": 8,
}
SAM2 = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 32,
    "num_attention_heads": 1,
    "image_size": [64, 64],
    "blocks_per_stage": [1, 1, 1, 1],
    "embed_dim_per_stage": [32, 64, 128, 256],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [8, 4, 2, 2],
    "global_attention_blocks": [],
}
SAM2_NECK = {
    "backbone_channel_list": [256, 128, 64, 32],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    "fpn_hidden_size": 32,
}
TRANSFORMERS: Mapping[str, tuple[dict[str, Any], int]] = {
    "ViTModel": (PLAIN, 32),
    "DeiTModel": (PLAIN, 32),
    "Dinov2Model": (PLAIN, 32),
    "Dinov2WithRegistersModel": (PLAIN, 32),
    "DINOv3ViTModel": (PLAIN, 32),
    "CLIPVisionModel": (PLAIN, 32),
    "SiglipVisionModel": (PLAIN, 32),
    "BeitModel": (PLAIN, 32),
    "SwinModel": ({**WINDOWS, "window_size": 4}, 32),
    "ViTMSNModel": (PLAIN, 32),
    "IJepaModel": (PLAIN, 32),
    "OwlViTVisionModel": (PLAIN, 32),
    "Aimv2VisionModel": (PLAIN, 32),
    "YolosModel": ({**PLAIN, "image_size": [32, 32], "num_detection_tokens": 4}, 32),
    "DPTModel": ({**PLAIN, "backbone_out_indices": [0, 0, 1, 1]}, 32),
    "VitPoseBackbone": ({**PLAIN, **SIDES}, 32),
    "Data2VecVisionModel": (PLAIN, 32),
    "ViTMAEModel": ({**PLAIN, "mask_ratio": 0.0}, 32),
    "SegformerModel": (PYRAMID, 64),
    "GLPNModel": (PYRAMID, 64),
    "PvtModel": ({**PYRAMID, "image_size": 64, "sequence_reduction_ratios": [8, 4, 2, 1]}, 64),
    "PvtV2Model": ({**PYRAMID, "image_size": 64}, 64),
    "Swinv2Model": ({**WINDOWS, "window_size": 4}, 32),
    "HieraModel": (HIERA, 64),
    "SamVisionModel": ({**PLAIN, **SAM}, 64),
    "Sam2VisionModel": ({"backbone_config": SAM2, **SAM2_NECK}, 64),
}
PARTS = {
    "transformers Mask2Former over Swin, backbone": "model.model.pixel_level_module.encoder",
    "transformers CLIP in a LLaVA-like model": "model.tower",
    "segmentation_models_pytorch Unet over mit_b0": "model.encoder",
    "segmentation_models_pytorch DPT over a ViT": "model.encoder",
}
"""Submodules that are pruned instead of the whole model."""
SIZES = (1e-5, 1e-6, 1e-4)
"""Largest relative differences: at full width, in a new process, in ONNX Runtime."""


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` over patches."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 32, 4, 4)
        self.pos_embed = nn.Parameter(torch.zeros(1, 64, 32))
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.encoder(self.patch_embed(x).flatten(2).mT + self.pos_embed)
        return tokens


class OneTensor(nn.Module):
    """A model that gives its first tensor only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        output = self.model(x)
        while not isinstance(output, Tensor):
            parts = output.values() if isinstance(output, Mapping) else output
            output = next(part for part in parts if part is not None)
        return output


class Dinov2Attention(nn.Module):
    """Attention in the code of DINO, DINOv2 and Depth Anything."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * self.scale, qkv[1], qkv[2]
        attn = self.attn_drop((q @ k.transpose(-2, -1)).softmax(dim=-1))
        x = (attn @ v).transpose(1, 2).reshape(b, n, c)
        out: Tensor = self.proj_drop(self.proj(x))
        return out


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        return x * x.new_empty(len(x), 1, 1).bernoulli_(1 - self.drop_prob) / (1 - self.drop_prob)


class Dinov2Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
        return out


class Dinov2Block(nn.Module):
    """Block of DINOv2's code; its drop paths run in training only."""

    def __init__(self, dim: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Dinov2Attention(dim, num_heads)
        self.ls1, self.drop_path1 = LayerScale(dim), DropPath()
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Dinov2Mlp(dim, hidden)
        self.ls2, self.drop_path2 = LayerScale(dim), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            out: Tensor = self.ls1(self.attn(self.norm1(x)))
            return out

        def feed(x: Tensor) -> Tensor:
            out: Tensor = self.ls2(self.mlp(self.norm2(x)))
            return out

        if self.training:
            x = x + self.drop_path1(attend(x))
            return x + self.drop_path1(feed(x))
        x = x + attend(x)
        return x + feed(x)


class Chunk(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class Dinov2(nn.Module):
    """``DinoVisionTransformer`` of DINOv2's repository, which ``torch.hub`` opens."""

    def __init__(
        self,
        dim: int = 32,
        depth: int = 2,
        num_heads: int = 2,
        size: int = 32,
        patch: int = 4,
        chunks: int = 0,
        levels: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.patch_embed, self.levels = nn.Conv2d(3, dim, patch, patch), levels
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (size // patch) ** 2, dim))
        blocks = [Dinov2Block(dim, num_heads, 4 * dim) for _ in range(depth)]
        if chunks:
            near = range(0, depth, chunks)
            padded = [[nn.Identity()] * first + blocks[first : first + chunks] for first in near]
            self.blocks = nn.ModuleList(Chunk(part) for part in padded)
        else:
            self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1) + self.pos_embed
        found = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self.levels:
                found.append(x)
        if self.levels:
            return {"levels": torch.cat([self.norm(level)[:, 1:] for level in found], -1)}
        x = self.norm(x)
        return {"x_norm_patchtokens": x[:, 1:], "x_norm_clstoken": x[:, 0]}


def of_transformers(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        cls: Any = getattr(transformers, name)
        return cls(cls.config_class(**TRANSFORMERS[name][0]))

    return build


def eomt() -> nn.Module:
    import transformers

    config = transformers.EomtConfig(**PLAIN, num_blocks=1, num_queries=5, num_upscale_blocks=1)
    return transformers.EomtForUniversalSegmentation(config)


def mask2former() -> nn.Module:
    import transformers

    levels = [f"stage{number}" for number in range(1, 5)]
    sizes = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "window_size": 4}
    swin = transformers.SwinConfig(**sizes, depths=[1] * 4, num_heads=[1, 2, 4, 8], out_features=levels)
    widths = ("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward")
    layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 5}
    config = transformers.Mask2FormerConfig(backbone_config=swin, **dict.fromkeys(widths, 32), **layers)
    return transformers.Mask2FormerForUniversalSegmentation(config)


def rf_detr() -> nn.Module:
    from transformers.models.rf_detr import RfDetrDinov2Backbone, RfDetrDinov2Config

    sizes = {key: value for key, value in PLAIN.items() if key != "intermediate_size"}
    return RfDetrDinov2Backbone(
        RfDetrDinov2Config(**sizes, num_windows=2, out_features=["stage1", "stage2"])  # type: ignore[call-arg]
    )


class Llava(nn.Module):
    """A CLIP tower, whose hidden states before the last layer a projector reads."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        self.tower = transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(**PLAIN | {"num_hidden_layers": 3})
        )
        self.projector = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        states = self.tower(x, output_hidden_states=True).hidden_states
        out: Tensor = self.projector(states[-2][:, 1:])
        return out


class Qwen(nn.Module):
    """The vision tower of Qwen2.5-VL, which reads the patches of all images as 1 sequence."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

        sizes = {
            "hidden_size": 32,
            "depth": 2,
            "num_heads": 2,
            "intermediate_size": 64,
            "out_hidden_size": 32,
        }
        config = qwen.Qwen2_5_VLVisionConfig(**sizes, patch_size=4, window_size=16, fullatt_block_indexes=[1])
        self.tower = qwen.Qwen2_5_VisionTransformerPretrainedModel(config)

    def forward(self, x: Tensor) -> Tensor:
        count, _, height, width = x.shape
        patches = (
            x.unfold(2, 4, 4).unfold(3, 4, 4).movedim(1, 3).unsqueeze(4).expand(-1, -1, -1, -1, 2, -1, -1)
        )
        grid = torch.tensor([[1, height // 4, width // 4]] * count)
        tokens: Tensor = self.tower(patches.reshape(-1, 96), grid).last_hidden_state
        return tokens.unflatten(0, (count, -1))


class DinoBlock(nn.Module):
    """Block of DINO's and MAE's code: 1 drop path, and attention that returns its weights."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), DinoAttention(dim, num_heads)
        self.drop_path = nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(dim), Dinov2Mlp(dim, 2 * dim)

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor:
        y, attn = self.attn(self.norm1(x))
        if return_attention:
            weights: Tensor = attn
            return weights
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DinoAttention(Dinov2Attention):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        attn = self.attn_drop(((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1))
        x = (attn @ v).transpose(1, 2).reshape(b, n, c)
        return self.proj_drop(self.proj(x)), attn


class Dino(Dinov2):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DinoBlock(32, 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)["x_norm_clstoken"]


def relative_positions(table: Tensor, side: int) -> Tensor:
    """Return the table's row for each pair of places, [side, side, C]. Other sides resize the table."""
    if len(table) != 2 * side - 1:
        table = nn.functional.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
    places = torch.arange(side)
    return table[places[:, None] - places + side - 1]


class SamAttention(nn.Module):
    """Attention of SAM's code on a map, with decomposed tables of relative positions."""

    def __init__(self, dim: int, num_heads: int, side: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, dim // num_heads))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        qkv = self.qkv(x).reshape(b, h * w, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, b * self.num_heads, h * w, -1).unbind(0)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        rows, columns = relative_positions(self.rel_pos_h, h), relative_positions(self.rel_pos_w, w)
        grid = q.reshape(b * self.num_heads, h, w, -1)
        by_row = torch.einsum("bhwc,hkc->bhwk", grid, rows)
        by_column = torch.einsum("bhwc,wkc->bhwk", grid, columns)
        attn = attn.view(-1, h, w, h, w) + by_row[..., None] + by_column[:, :, :, None]
        attn = attn.view(-1, h * w, h * w).softmax(dim=-1)
        x = (attn @ v).view(b, self.num_heads, h, w, -1).permute(0, 2, 3, 1, 4).reshape(b, h, w, -1)
        out: Tensor = self.proj(x)
        return out


class SamBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), Dinov2Mlp(dim, 2 * dim)
        self.attn, self.window_size = SamAttention(dim, num_heads, window or 8), window

    def forward(self, x: Tensor) -> Tensor:
        shortcut, y, side = x, self.norm1(x), self.window_size
        if side:
            b, h, w, c = y.shape
            y = y.view(b, h // side, side, w // side, side, c).transpose(2, 3).reshape(-1, side, side, c)
            y = self.attn(y).view(b, h // side, w // side, side, side, c).transpose(2, 3).reshape(b, h, w, c)
        else:
            y = self.attn(y)
        x = shortcut + y
        return x + self.mlp(self.norm2(x))


class Sam(nn.Module):
    """The image encoder of SAM's repository."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 32, 8, 8)
        self.pos_embed = nn.Parameter(torch.zeros(1, 8, 8, 32))
        self.blocks = nn.ModuleList(SamBlock(32, 2, window) for window in (4, 0))
        self.neck = nn.Conv2d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).permute(0, 2, 3, 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.neck(x.permute(0, 3, 1, 2))
        return out


def open_clip_siglip() -> nn.Module:
    import timm
    from open_clip.timm_model import TimmModel

    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 4}
    model = TimmModel("vit_base_patch16_siglip_224", embed_dim=16, pool="", proj="none", pretrained=False)
    model.trunk = timm.create_model("vit_base_patch16_siglip_224", num_classes=0, **sizes)
    return model


def smp_unet() -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.Unet("mit_b0", encoder_weights=None)


def smp_dpt() -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.DPT("tu-vit_tiny_patch16_224", encoder_weights=None)


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 4, 2, 2, 32, 64, num_classes=5)


def torchvision_swin(version: str) -> nn.Module:
    from torchvision.models import swin_transformer as swin

    more = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    options = more if version == "v2" else {}
    return swin.SwinTransformer([4, 4], 32, [2, 2], [4, 8], [4, 4], num_classes=5, **options)


def open_clip_vit() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(32, 4, 32, 2, 2, 4.0, output_dim=16)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{f"transformers {name}": (of_transformers(name), size) for name, (_, size) in TRANSFORMERS.items()},
    "DINOv2's code": (Dinov2, 32),
    "DINOv2's code, blocks in chunks": (lambda: Dinov2(depth=4, chunks=2), 32),
    "DINOv2's code, intermediate layers": (lambda: Dinov2(depth=4, levels=(1, 3)), 32),
    "torchvision VisionTransformer": (torchvision_vit, 32),
    "torchvision SwinTransformer": (lambda: torchvision_swin("v1"), 64),
    "torchvision SwinTransformer, v2": (lambda: torchvision_swin("v2"), 64),
    "open_clip VisionTransformer": (open_clip_vit, 32),
    "transformers EoMT": (eomt, 32),
    "transformers Mask2Former over Swin, backbone": (mask2former, 64),
    "transformers RF-DETR's DINOv2 backbone": (rf_detr, 32),
    "transformers CLIP in a LLaVA-like model": (Llava, 32),
    "transformers Qwen2.5-VL, vision tower": (Qwen, 32),
    "open_clip SigLIP": (open_clip_siglip, 32),
    "segmentation_models_pytorch Unet over mit_b0": (smp_unet, 64),
    "segmentation_models_pytorch DPT over a ViT": (smp_dpt, 224),
    "DINO's and MAE's code": (Dino, 32),
    "SAM's code": (Sam, 64),
    "torch TransformerEncoder, pre-norm": (lambda: Encoder(norm_first=True), 32),
    "torch TransformerEncoder, post-norm": (lambda: Encoder(norm_first=False), 32),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = OneTensor(MODELS[name][0]())
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def images(name: str, count: int) -> Tensor:
    size = MODELS[name][1]
    noise = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return noise.repeat_interleave(size // 4, 2).repeat_interleave(size // 4, 3)  # neighbours are alike


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def prune(name: str) -> tuple[nn.Module, mhacut.InPlaceResult]:
    """Prune to the first budget in reach."""
    for budget in ("45%", "60%", "75%", "90%"):
        model = build(name)
        try:
            part, batches = PARTS.get(name, "model"), images(name, 24).split(8)
            result = mhacut.prune_(model, part, images=batches, flops=budget, effort="fast", tuning_steps=0)
        except mhacut.BudgetError:
            continue
        return model, result
    raise mhacut.BudgetError("90% is out of reach")


def run_onnx(model: nn.Module, x: Tensor, folder: Path) -> Tensor:
    import onnxruntime

    torch.onnx.export(model, (x,), str(folder / "model.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def row_of(name: str) -> tuple[str, bool, bool]:
    """Return a row of the table, whether attention is cut, and whether all checks hold."""
    dense, x = build(name), images(name, 2)
    prunable = find_prunable_layers(dense)
    counts = Counter(unit.kind for unit in prunable.units())
    cells = [", ".join(f"{count} {kind}" for kind, count in counts.items())]
    cells.append("; ".join(cls.rpartition(".")[2] for cls in prunable.unknown) or "nothing")
    full = copy.deepcopy(dense)
    cut(full, Plan(tuple(unit.keep_first(unit.width) for unit in prunable.units())))
    errors: list[float | str] = [relative(full(x), dense(x))]
    shares = ["-", "-"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            model, result = prune(name)
            merged = sum(result.plan.tokens.merged)
            shares = [f"{result.flops_after / result.flops_before:.0%}", f"{merged or 'no'} tokens"]
            mhacut.save_pruned(model, folder / "part.safetensors")
            command = [sys.executable, "-W", "ignore", __file__, "--open", temporary, name]
            subprocess.run(command, check=True, capture_output=True)
            errors.append(relative(torch.load(folder / "output.pt"), model(x)))
            errors.append(relative(run_onnx(model, x, folder), model(x)))
        except Exception as error:  # of the library or of the exporter
            errors.append(f"{type(error).__name__}: {str(error).splitlines()[0]:.60}")
    limits = zip(errors, SIZES, strict=False)
    good = len(errors) == len(SIZES) and all(
        isinstance(error, float) and error <= limit for error, limit in limits
    )
    cells += [*shares, *(f"{error:.0e}" if isinstance(error, float) else error for error in errors)]
    return f"| {name} | {' | '.join([*cells, *['-'] * (3 - len(errors))])} |", "v" in counts, good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="*")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open is not None:  # the new process
        model = build(options.pattern)
        mhacut.apply_pruned(model, options.open / "part.safetensors")
        torch.save(model(images(options.pattern, 2)), options.open / "output.pt")
        return 0
    lines = [
        "| model | units cut | attention that stays | FLOPs | merged | full width | new process "
        "| ONNX Runtime |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = fnmatch.filter(MODELS, options.pattern)
    attention, whole = 0, 0
    for name in names:
        try:
            line, cuts_attention, good = row_of(name)
        except MhacutError as error:
            line, cuts_attention, good = f"| {name} | refused: {error!s:.80} | | | | | | |", False, False
        attention, whole = attention + cuts_attention, whole + good
        lines.append(line)
        print(line, flush=True)
    lines += ["", f"Attention is cut in {attention} of {len(names)} models. All checks hold for {whole}."]
    print(lines[-1])
    if options.markdown is not None:
        options.markdown.write_text("\n".join(lines) + "\n")
    return int(whole < len(names))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
