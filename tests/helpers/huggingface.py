"""A tiny vision transformer as Hugging Face's transformers write it, in a model with a head of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 7,
}


def dense_folder(folder, name, dtype=torch.float32, **sizes):
    transformers = pytest.importorskip("transformers", reason="pip install 'mhacut[interop]'")
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    config = cls.config_class(**{**SIZES, "initializer_range": 0.2, **sizes})
    cls(config).to(dtype).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


class TinyAttention(nn.Module):
    """Four linear layers, and one size of a head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_attention_heads, self.head_dim = heads, width // heads
        self.scaling = self.head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.o_proj = nn.Linear(width, width)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: object
    ) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            layer(hidden_states).view(shape).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, scale=self.scaling)
        return self.o_proj(y.transpose(1, 2).flatten(2)), None


class TinyMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.activation_fn, self.fc2 = (
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


class TinyLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), TinyAttention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), TinyMLP(width)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(hidden_states=self.norm1(x), attention_mask=attention_mask)[0]
        return x + self.mlp(self.norm2(x))


class TinyBackbone(nn.Module):
    """A ViT that returns a dict of its last tokens, the first of them, and all hidden states."""

    def __init__(self, width: int = 32, heads: int = 2, depth: int = 2, patch: int = 4) -> None:
        super().__init__()
        self.patch_embeddings = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.layer = nn.ModuleList(TinyLayer(width, heads) for _ in range(depth))
        self.layernorm = nn.LayerNorm(width)

    def forward(
        self, pixel_values: Tensor, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor | tuple[Tensor, ...]]:
        x = self.patch_embeddings(pixel_values).flatten(2).mT
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1)
        hidden = [x]
        for layer in self.layer:
            hidden.append(x := layer(x, attention_mask=attention_mask))
        x = self.layernorm(x)
        return {"last_hidden_state": x, "pooler_output": x[:, 0], "hidden_states": tuple(hidden)}


class Segmenter(nn.Module):
    """Reads the last two hidden states, patch by patch, of images that it scales first."""

    def __init__(self, backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = TinyBackbone() if backbone is None else backbone
        self.neck = nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(64, 3)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.backbone(pixel_values=2 * self.neck(pixel_values))["hidden_states"]
        return {"masks": self.head(torch.cat(hidden[-2:], -1)[:, 1:])}
