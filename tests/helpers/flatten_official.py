"""What the official FLatten models give, and how to ask ours for the same.

``flatten_official.json`` was measured on the official code (LeapLabTHU/FLatten-Transformer, abdb115f):
per model its image size, parameters, fvcore FLOPs and number of state-dict entries; for ten of them also a
digest of all names and shapes, and for weights and images that a hash of their names decides, logits in
float64 (first eight, sum and norm of each of two rows) and, for four, mean and deviation of what modules
give.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

OFFICIAL = json.loads((Path(__file__).parents[1] / "fixtures" / "flatten_official.json").read_text())
REFERENCED = tuple(name for name, facts in OFFICIAL.items() if "logits" in facts)


def hashed(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float64 numbers, uniform of mean 0 and deviation 1: murmur3's finaliser over index and name."""
    seed = zlib.crc32(name.encode()) * 0x9E3779B1 & 0xFFFFFFFF
    bits = (np.arange(math.prod(shape), dtype=np.uint64) + seed).astype(np.uint32)
    bits ^= bits >> np.uint32(16)
    bits *= np.uint32(0x85EBCA6B)
    bits ^= bits >> np.uint32(13)
    bits *= np.uint32(0xC2B2AE35)
    bits ^= bits >> np.uint32(16)
    return (((bits + 0.5) / 2.0**32 - 0.5) * math.sqrt(12)).reshape(shape)


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    value = hashed(name, shape)
    if name.endswith(".bias"):
        value = 0.1 * value
    elif name.endswith(".weight"):
        value = 1 + 0.1 * value if len(shape) == 1 else value / math.sqrt(math.prod(shape[1:]))
    else:  # scales, encodings, tables of position biases
        value = 0.5 * value
    return torch.from_numpy(value)


def images(size: int) -> Tensor:
    return torch.from_numpy(hashed("input", (2, 3, size, size)))


def official_name(name: str) -> str:
    if re.match(r"layers\.", name):  # Swin
        return re.sub(
            r"layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", name
        )
    if name.startswith("stages."):  # PVTv2
        name = re.sub(r"stages\.(\d)\.downsample", lambda found: f"patch_embed{int(found[1]) + 1}", name)
        name = re.sub(r"stages\.(\d)\.blocks\.", lambda found: f"block{int(found[1]) + 1}.", name)
        name = re.sub(r"stages\.(\d)\.norm", lambda found: f"norm{int(found[1]) + 1}", name)
        return name.replace(".dwconv.", ".dwconv.dwconv.")
    name = re.sub(r"^(stage\d\.\d+)\.attn\.", r"\1.", name)  # CSWin
    return name.replace("head.fc.", "head.")


def official_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the official twin of ``model`` would have, filled by the recipe; float64."""
    v2 = hasattr(model, "stages")
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        name = re.sub(r"^patch_embed\.", "patch_embed1.", name) if v2 else name
        state[official_name(name)] = weight(official_name(name), tuple(parameter.shape))
    # Official Swin keeps these tables and masks as buffers in its files.
    for name, buffer in model.named_buffers():
        if name.endswith(("relative_position_index", "attn_mask")):
            state[official_name(name)] = buffer.clone()
    return state


def digest(state: dict[str, Tensor]) -> str:
    shapes = sorted((name, list(tensor.shape)) for name, tensor in state.items())
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()
