"""``model.py`` of a timm folder: code that opens the pruned model without mhacut."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from timm.layers import Attention
from timm.models import swin_transformer, vision_transformer
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from mhacut.adapters.softmax import Softmax, Twin
from mhacut.errors import UnsupportedModelError
from mhacut.exporting import standalone
from mhacut.surgery import token_merging
from mhacut.surgery.merging_blocks import Matcher, Merging, MergingBlock
from mhacut.surgery.output_tokens import OutputTokenBlock

_MIXINS = {
    Attention: standalone.SlimAttention,
    swin_transformer.WindowAttention: standalone.SlimAttention,
    vision_transformer.Block: standalone.SlimBlock,
    vision_transformer.VisionTransformer: standalone.SlimViT,
    VisionTransformerDistilled: standalone.SlimViT,
}
"""Classes of timm that ``model.py`` can change, each with the mixin for a changed layer."""
_SPLIT = ("q", "kv")
"""Names of projections that mhacut adds to the attention of a block that computes few tokens."""
_MERGING: tuple[Any, ...] = (
    token_merging.Match,
    token_merging.SizedTokens,
    token_merging.weigh,
    token_merging.match,
    token_merging.merge,
    token_merging._take_rows,
    token_merging.at_least_float32,
    token_merging.full_precision,
)

_DROPPED = ("unmerge", "__getitem__", "__add__", "__getattr__", "__torch_function__")
"""Methods of token merging that ``model.py`` does not call."""


def timm_code(model: nn.Module, architecture: str, arguments: Mapping[str, Any]) -> str:
    """Return the text of ``model.py`` for a pruned timm model.

    :class:`UnsupportedModelError` names a class of layers that ``model.py`` cannot change.
    """
    with torch.device("meta"):
        dense = timm.create_model(architecture, **arguments)
    changes = list(_changes(model, dict(dense.named_modules())))
    parts: list[Any] = [standalone.change, standalone.load]
    if any("SlimAttention" in change for change in changes):
        parts.insert(0, standalone.SlimAttention)
    if any("SlimBlock" in change for change in changes):
        parts = [*_MERGING, standalone.SlimBlock, standalone.SlimViT, *parts]
    text = "\n\n".join(_short(inspect.getsource(part), part in _MERGING) for part in parts)
    # Features of merged patches, positions in attention, and merges of neighbours would need more code.
    text = re.sub(r" +if ((token_of_patch|positions) is not None|neighbours):\n.*\n", "", text)
    text = re.sub(r"_set_b\((\w+), prefix\)", r"\1[:, prefix::2]", text)  # equal, except in torch.export
    built = "\n".join(changes)
    return f'''"""{architecture}, pruned by mhacut: ``build()`` returns the model with its weights."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.models import load_state_dict
from torch import Tensor, nn

ATTENTION_FLOOR, _MIN_NORM = {token_merging.ATTENTION_FLOOR}, {token_merging._MIN_NORM}

{text}

def build(weights: Path = Path(__file__).with_name("model.safetensors")) -> nn.Module:
    """Build the dense model, change its layers, and load the weights."""
    model = timm.create_model({architecture!r}, **{dict(arguments)!r})
{built}
    return load(model, weights)
'''


def _changes(model: Any, dense: Mapping[str, Any]) -> Iterator[str]:
    merges: dict[int, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, MergingBlock) and module.gives_sizes and not module.unmerge:
            merges[int(name.rpartition(".")[2])] = 0 if module.matcher is None else module.matcher.count
            continue
        if isinstance(module, Matcher) or name not in dense:
            continue
        plain, attributes = dense[name], {}
        if type(module) is type(plain):
            mixin = None
            for key, value in vars(module).items():
                differs = isinstance(value, bool | int | float | str) and vars(plain).get(key) != value
                if differs and key not in ("training", "in_features", "out_features") and key[0] != "_":
                    attributes[key] = repr(value)
        else:
            mixin = _MIXINS.get(type(plain))
            if (
                mixin is None
                or getattr(module, "unmerge", False)
                or getattr(module, "gate", None) is not None
            ):
                raise UnsupportedModelError(f"model.py does not support {type(plain).__name__} ({name})")
            attributes = {key: str(value) for key, value in _attributes(module)}
        if mixin or attributes:
            words = [repr(name), *([mixin.__name__] if mixin else [])]
            values = [f"{key}={value}" for key, value in attributes.items()]
            yield f"    change(model, {', '.join([*words, *values])})"
    if merges:
        if model.attn_pool is not None:
            raise UnsupportedModelError(
                f"model.py does not support merged tokens before {type(model.attn_pool).__name__} (attn_pool)"
            )
        # mhacut merges the same share of the tokens at all image sizes, model.py the same number.
        if not model.patch_embed.strict_img_size:
            raise UnsupportedModelError("model.py merges tokens at 1 image size (dynamic_img_size=True)")
        yield f"    for block, merged in {merges}.items():"
        values = ["merged=merged", "prefix=model.num_prefix_tokens", "returns_sizes=True"]
        yield f'        change(model, f"blocks.{{block}}", SlimBlock, {", ".join(values)})'


def _attributes(module: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(module, Twin):
        spec: Softmax = module.spec
        sizes = spec.sizes(module)
        yield from (("qk", sizes["q"][1]), ("v", sizes["v"][1]), ("scale", module.scale))
        if module.qkv is None:
            yield "qkv", None
            yield from ((name, _linear(getattr(module, name))) for name in _SPLIT)
            yield "output_tokens", module.output_tokens
        if spec.weigh.__name__ == "cls_attention":
            yield "weighs_tokens", True
    if isinstance(module, OutputTokenBlock):
        yield "output_tokens", module.attn.output_tokens
    if isinstance(module, Merging):
        yield "returns_sizes", getattr(module, "gives_sizes", False)


def _linear(layer: nn.Linear) -> str:
    return f"nn.Linear({layer.in_features}, {layer.out_features}, bias={layer.bias is not None})"


def _short(source: str, is_merging: bool) -> str:
    """Remove comment lines; for token merging also docstrings and unused methods."""
    lines, dropped = source.splitlines(), set[int]()
    nodes: Any = ast.walk(ast.parse(source)) if is_merging else ()
    for node in nodes:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or (isinstance(node, ast.FunctionDef) and node.name in _DROPPED):
            first = min([node.lineno, *(mark.lineno for mark in getattr(node, "decorator_list", ()))])
            dropped.update(range(first, node.end_lineno + 1))
    kept = [line for number, line in enumerate(lines, 1) if number not in dropped]
    text = "\n".join(line for line in kept if not line.strip().startswith("#"))
    text = re.sub(r"\n{2,}", "\n\n", text).rstrip() + "\n"
    return text if not is_merging else text.replace(":\n\n", ":\n")
