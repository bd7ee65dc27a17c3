"""Vision transformers in the code of several repositories, written from scratch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mhacut.surgery.hooks import captured_outputs


class Attention(nn.Module):
    """As in the repositories of DINO, DINOv2 and MAE: takes no mask."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        attn = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1))
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).reshape(b, n, c)))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Scale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(dim))

    def forward(self, x):
        return x * self.gamma


class DropPath(nn.Identity):
    pass


class Dinov2Block(nn.Module):
    """The drop paths run in training only, the first twice."""

    def __init__(self, dim, attention=Attention, mlp=Mlp):
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(dim), attention(dim, 2), Scale(dim)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(dim), mlp(dim), Scale(dim)
        self.drop_path1, self.drop_path2 = DropPath(), DropPath()

    def forward(self, x):
        if self.training:
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
            return x + self.drop_path1(self.ls2(self.mlp(self.norm2(x))))
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class OpenClipBlock(nn.Module):
    """``nn.MultiheadAttention``, with the tokens in the first dimension or the second."""

    def __init__(self, dim, batch_first=True):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(dim), nn.MultiheadAttention(dim, 2, batch_first=batch_first)
        self.ls_1, self.ls_2 = nn.Identity(), nn.Identity()
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, q_x, k_x=None, attn_mask=None):
        y = self.ln_1(q_x)
        x = q_x + self.ls_1(self.attn(y, y, y, need_weights=False, attn_mask=attn_mask)[0])
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class GammaBlock(nn.Module):
    """Layer scales that are parameters of the block, and an MLP in two modules, one of which adds."""

    def __init__(self, dim):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim), Attention(dim, 2), nn.LayerNorm(dim)
        self.gamma = nn.Parameter(torch.rand(dim))
        self.intermediate, self.output = nn.Linear(dim, 2 * dim), Added(2 * dim, dim)
        self.activation = F.gelu

    def forward(self, x):
        x = x + self.gamma * self.attn(self.norm1(x))
        return self.output(self.activation(self.intermediate(self.norm2(x))), x)


class Added(nn.Module):
    def __init__(self, hidden, dim):
        super().__init__()
        self.dense = nn.Linear(hidden, dim)

    def forward(self, x, residual):
        return self.dense(x) + residual


BUILDERS = {
    "dinov2": Dinov2Block,
    "open_clip": OpenClipBlock,
    "tokens first": lambda dim: OpenClipBlock(dim, batch_first=False),
    "parameters": GammaBlock,
    "torch": lambda dim: nn.TransformerEncoderLayer(dim, 2, 2 * dim, batch_first=True, norm_first=True),
}


class Rotary(Attention):
    """Attention that depends on the places of its tokens."""

    def forward(self, x):
        return super().forward(x + torch.arange(x.shape[1]).sin()[:, None])


class Mixing(Mlp):
    """An MLP in which tokens see their mean."""

    def forward(self, x):
        return super().forward(x + x.mean(1, keepdim=True))


OTHERS = {
    "rotary": lambda dim: Dinov2Block(dim, Rotary),
    "mixing": lambda dim: Dinov2Block(dim, mlp=Mixing),
    "normed after": lambda dim: nn.TransformerEncoderLayer(dim, 2, 2 * dim, batch_first=True),
}


class Vit(nn.Module):
    """Class tokens before the patches, detection tokens behind them, perhaps positions between the blocks."""

    def __init__(self, block, dim=32, depth=2, first=1, last=0, positions=True, levels=(), between=False):
        super().__init__()
        self.patch_embed, self.levels = nn.Conv2d(3, dim, 4, 4), levels
        self.first, self.last = (nn.Parameter(torch.randn(1, count, dim)) for count in (first, last))
        self.positions = nn.Parameter(0.1 * positions * torch.randn(1, 64, dim))
        self.blocks = nn.ModuleList(block(dim) for _ in range(depth))
        self.between = nn.Parameter(torch.randn(1, first + 64 + last, dim)) if between else None
        attention = getattr(self.blocks[0], "attn", None)
        self.tokens_first = not getattr(attention, "batch_first", True)

    def forward(self, x):
        x, count = self.patch_embed(x).flatten(2).mT + self.positions, x.shape[0]
        x = torch.cat((self.first.expand(count, -1, -1), x, self.last.expand(count, -1, -1)), 1)
        x, levels = x.transpose(0, 1) if self.tokens_first else x, []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if self.between is not None and number < len(self.blocks) - 1:
                x = x + self.between
            if number in self.levels:
                levels.append(F.layer_norm(x, x.shape[-1:]))
        if self.levels:
            return torch.cat(levels, -1)
        return x.transpose(0, 1) if self.tokens_first else x


def tokens_of_own_code(model, block, images):
    """Return the output of ``block``, :class:`mhacut.surgery.token_merging.SizedTokens`."""
    name = next(name for name, module in model.named_modules() if module is block)
    with captured_outputs(model, [name]) as outputs:
        model(images)
    return outputs[name][0]
