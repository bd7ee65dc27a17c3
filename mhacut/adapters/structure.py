"""Adapters of unknown attention and MLP classes, found from their linear layers and tested on random tokens.

A structure is accepted only if a cut layer computes the outputs of the masked module, in float64 with random
weights. Otherwise the module is not cut.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import permutations, product
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from mhacut.adapters.attend import as_map, as_tokens, attend, weights_of
from mhacut.adapters.base import Adapter, ChannelAxis, Layer, Mixing, Unit
from mhacut.adapters.mlp import Mlp
from mhacut.adapters.multihead import MULTIHEAD
from mhacut.adapters.softmax import Hook, Softmax, Twin
from mhacut.errors import UnsupportedModelError
from mhacut.plan import UnitKind

_TOLERANCE = 1e-6
"""Largest relative difference between equal outputs, because some attention classes compute in float32."""
_GRIDS = ((8, 8), (8, 16))
"""Heights and widths of the random token maps on which a found structure is tested."""
_PROVED: dict[tuple[Any, ...], Adapter | None] = {}
"""Cache of adapters found by structure. Copies of a module on the meta device have no weights to test and use
the cache."""


class _NamedTwin(Twin):
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        tokens = args or (options.pop(self.spec.tokens_name),)
        return super().forward(*tokens, **options)


def _with_mask(m: Any, q: Tensor, k: Tensor, x: Tensor, *args: Any) -> tuple[Any, ...]:
    mask = None
    for (name, default), value in zip(m.spec.arguments, args, strict=True):
        if value is None or value is default or value is False or _are_sizes(value):
            continue
        if name != m.spec.mask_name:
            raise UnsupportedModelError(f"a cut {m.spec.cls.__name__} takes no argument {name!r}")
        mask = value
    return q, k, mask


def _reduced(m: Any, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    if m.spec.reduced_by is None:
        return x, x
    convolution, norm = map(m.get_submodule, m.spec.reduced_by)
    given = {name.lower()[:1]: value for (name, _), value in zip(m.spec.arguments, args, strict=True)}
    return x, norm(as_tokens(convolution(as_map(x, (given["h"], given["w"])))))


def _are_sizes(value: Any) -> bool:
    entries = value if isinstance(value, tuple | list) else (value,)
    # Sizes are tensors while torch traces.
    return all(type(entry) is int or (isinstance(entry, Tensor) and not entry.dim()) for entry in entries)


def _attended(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    dropout = m.attn_drop.p if m.training and hasattr(m, "attn_drop") else 0.0
    return attend(q, k, v, scale=q.shape[-1] ** -0.5, fused=True, attn_mask=mask, dropout_p=dropout)


def _attended_with_weights(
    m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    weights = weights_of(q, k, q.shape[-1] ** -0.5, mask)  # (B, H, N, N)
    weights = m.attn_drop(weights) if hasattr(m, "attn_drop") else weights
    return weights @ v, weights


def _projected(m: Any, y: Tensor, *_: Any) -> Any:
    y = m.get_submodule(m.spec.read_by)(y)
    y = m.proj_drop(y) if hasattr(m, "proj_drop") else y
    return y if m.spec.beside is None else (y, *[None] * m.spec.beside)


@dataclass(eq=False)
class PlainAttention(Softmax):
    """Softmax attention over all tokens, found in a class for which mhacut has no adapter."""

    heads_at: str = "num_heads"
    """Name of the attribute that holds the number of heads, possibly in a submodule (``attn.num_heads``)."""
    beside: int | None = None
    """Number of ``None`` values after the output in a returned tuple. None: the layer returns a tensor."""
    reduced_by: tuple[str, str] | None = None
    """Names of the convolution and the norm that downsample the input of k and v. None: no downsampling."""
    inputs: Hook = _reduced
    logits: Hook = _with_mask
    weigh: Hook = _attended
    finish: Hook = _projected
    mixins: tuple[type, ...] = (_NamedTwin,)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tokens_name = list(inspect.signature(self.cls.forward).parameters)[1]
        self.result = str(self.read_by)
        if self.mask_name is None and self.mixins:  # for the sizes of merged tokens
            self.mask_name = "attn_mask"
            self.arguments += ((self.mask_name, None),)

    def heads(self, module: Any) -> int:
        return int(attrgetter(self.heads_at)(module))


@dataclass(eq=False)
class OwnForward(PlainAttention):
    """Attention whose class still runs after a cut, because q, k and v keep equal widths."""

    sizes_at: tuple[tuple[str, str, str], ...] = ()
    """Attributes that depend on the head width d: submodule, attribute, and value (``d``, ``heads * d`` or
    ``scale``)."""
    tables: tuple[str, ...] = ()
    """Names of tables of relative positions, [positions, d], that multiply q. All heads share the tables."""
    mixing: Mapping[UnitKind, Mixing] | None = None
    """:data:`~mhacut.adapters.base.Mixing` by kind. None: ``select`` for qk, ``refit`` for v."""
    mixins: tuple[type, ...] = ()
    one_width = True
    equal_widths_only = True

    def describe(self, name: str, module: Any) -> Layer:
        layer = super().describe(name, module)
        careful: dict[UnitKind, Mixing] = {"qk": "select", "v": "refit"}
        mixing = self.mixing or careful
        return replace(layer, units=tuple(replace(unit, mixing=mixing[unit.kind]) for unit in layer.units))

    def qk(self, name: str, module: Any) -> Unit:
        plain = super().qk(name, module)
        if not self.tables:
            return plain
        shared = plain.heads > 1
        tables = tuple(ChannelAxis(table, 1, shared=shared) for table in self.tables)
        return replace(plain, axes=plain.axes + tables, sharing="tied" if shared else "own")

    def record_kept(self, module: Any, unit: Unit, kept: Tensor) -> None:
        """Divide the position tables by the factor on q that keeps the softmax temperature."""
        if unit.kind == "qk" and unit.softmax_scaled:
            for table in self.tables:
                module.get_parameter(table).data.mul_((unit.width / kept.shape[1]) ** 0.5)

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        heads, width = self.sizes(module)["q"]
        values = {"d": width, "heads * d": heads * width, "scale": width**-0.5}
        for owner, attribute, kind in self.sizes_at:
            setattr(module.get_submodule(owner), attribute, values[kind])


def adapter_by_structure(module: nn.Module) -> Adapter | None:
    """Return an adapter derived from the linear layers of a module; None if tests on random tokens fail."""
    spec = getattr(module, "spec", None)
    if isinstance(spec, PlainAttention):  # a cut layer
        return spec
    if type(module) in MULTIHEAD.module_classes:
        return MULTIHEAD
    # A module around a layer that has an adapter is no layer itself.
    owners = (part for part in module.modules() if any(isinstance(c, nn.Linear) for c in part.children()))
    if any(map(is_registered_library, owners)):
        return None
    linears = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    linears = _of_tokens(linears) if len(linears) > 4 else linears
    if "" in linears or not 2 <= len(linears) <= 4:
        return None
    return _proved(module, linears)


def _of_tokens(linears: Mapping[str, Any]) -> dict[str, Any]:
    widths = Counter(part.in_features for part in linears.values())
    width = widths.most_common(1)[0][0] if widths else 0
    return {name: part for name, part in linears.items() if width in (part.in_features, part.out_features)}


def is_registered_library(module: nn.Module) -> bool:
    """Whether mhacut has adapters for all prunable classes of the library that defines the class."""
    return type(module).__module__.startswith(("timm.", "mhacut."))


def mlp_of_block(module: nn.Module, layers: Collection[str]) -> Mlp | None:
    """Return the MLP whose 2 linear layers are in different submodules of the block ``module``."""
    linears = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and not any(f"{name}.".startswith(f"{layer}.") for layer in layers)
    }
    adapter = _proved(module, linears, only_mlp=True) if len(linears) in (2, 3) else None
    assert adapter is None or isinstance(adapter, Mlp)
    return adapter


def _proved(module: nn.Module, linears: Mapping[str, Any], *, only_mlp: bool = False) -> Adapter | None:
    key = _structure_of(module), only_mlp
    if key not in _PROVED:
        if next(module.parameters()).is_meta:
            return None
        _PROVED[key] = _Proof(module, linears).adapter(only_mlp=only_mlp)
    return _PROVED[key]


class _Proof:
    """Search for the structure of an unknown attention class, with a test of each candidate."""

    def __init__(self, module: nn.Module, linears: Mapping[str, Any]) -> None:
        self.linears, self.width = linears, next(iter(linears.values())).in_features
        self.trial: Any = with_random_weights(module)
        self.grids: tuple[tuple[int, int], ...] = _GRIDS
        self.as_map = False

    @torch.no_grad()
    def adapter(self, *, only_mlp: bool) -> Adapter | None:
        outputs: list[Any] = []
        for grids, on_map in product((_GRIDS, *_windows_of(self.trial)), (False, True)):
            self.grids, self.as_map = grids, on_map
            outputs = [self.run(self.trial, grid) for grid in self.grids]
            if None not in outputs:
                break
        else:
            return None
        cls, forms = type(self.trial), [] if only_mlp else [*_attention_forms(self.linears, self.trial)]
        first, *beside = outputs[0]
        gives_weights = len(beside) == 1 and isinstance(beside[0], Tensor) and beside[0].dim() == 4
        if first.dim() == 3 and (gives_weights or all(other is None for other in beside)):
            is_tuple = isinstance(self.trial(*self.inputs(self.grids[0])), tuple)
            convolutions, norms = (
                [name for name, part in self.trial.named_modules() if isinstance(part, kind)]
                for kind in (nn.Conv2d, nn.LayerNorm)
            )
            reduced_by = (convolutions[0], norms[0]) if len(convolutions) == len(norms) == 1 else None
            more: dict[str, Any] = {"beside": len(beside)} if is_tuple else {}
            more = {"weigh": _attended_with_weights} if gives_weights else more
            for form in forms:
                spec = PlainAttention(cls, reduced_by=reduced_by, **more, **form)
                if self.reproduces(spec):
                    return spec
        for form in forms:
            for own in _own_forms(cls, form, self.trial):
                if self.cuts_exactly(own):
                    own.mixing = self.mixing_of(own)
                    return own
        return next(
            (mlp for mlp in _mlp_forms(cls, self.trial, self.linears) if self.cuts_exactly(mlp)), None
        )

    def reproduces(self, spec: PlainAttention) -> bool:
        """Whether the candidate ``spec`` computes the outputs of the module, with and without a mask."""
        # Other dropouts than these two would be lost in training.
        dropouts = {name for name, part in self.trial.named_modules() if getattr(part, "p", 0)}
        if not dropouts <= {"attn_drop", "proj_drop"}:
            return False
        twin = copy.deepcopy(self.trial)
        spec.resize(twin, {})
        for grid in self.grids:
            tokens = grid[0] * grid[1]
            masks: list[dict[str, Tensor]] = [{}]
            if spec.mask_name and spec.mask_name in inspect.signature(spec.cls.forward).parameters:
                masks.append({spec.mask_name: torch.randn(2, 1, tokens, tokens, dtype=torch.float64)})
            for mask in masks:
                expected = self.run(self.trial, grid, **mask)
                if expected is None and mask:  # the class takes masks of another form
                    continue
                if not _equal(self.run(twin, grid, **mask), expected):
                    return False
        return True

    def cuts_exactly(self, adapter: Adapter) -> bool:
        """Whether cutting half of the channels gives the same outputs as multiplying them by 0."""
        generator = torch.Generator().manual_seed(0)
        masked, slim = copy.deepcopy(self.trial), copy.deepcopy(self.trial)
        layer = adapter.describe("", self.trial)
        if not layer.units or any(unit.width < 2 for unit in layer.units):
            return False
        places: dict[tuple[str, int], list[Tensor]] = {}
        for unit in layer.units:
            # Every head of every unit keeps other channels, as in a plan.
            half = (unit.width + 1) // 2
            order = torch.stack([torch.randperm(unit.width, generator=generator) for _ in range(unit.heads)])
            order = order[:1].expand(unit.heads, -1) if unit.sharing == "tied" else order
            kept, removed = order[:, :half].sort().values, order[:, half:]
            # The slim layer divides its logits by the root of another width.
            scale = (half / unit.width) ** 0.5 if unit.softmax_scaled else 1.0
            adapter.record_kept(slim, unit, kept)
            for axis in unit.axes:
                rows = axis.rows(unit.heads, unit.width)[..., 0]
                if axis in unit.scale_axes:
                    out = rows.gather(1, removed[: len(rows)]).flatten()
                    masked.get_parameter(axis.tensor).movedim(axis.dim, 0)[out] = 0
                    slim.get_parameter(axis.tensor).movedim(axis.dim, 0)[rows.flatten()] *= scale
                places.setdefault((axis.tensor, axis.dim), []).append(
                    rows.gather(1, kept[: len(rows)]).flatten()
                )
        for (name, dim), rows_kept in places.items():
            owner, last = slim.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            index = torch.cat(rows_kept).sort().values
            setattr(owner, last, nn.Parameter(getattr(owner, last).index_select(dim, index)))
            if isinstance(owner, nn.Conv2d):
                owner.groups = len(index)
            elif isinstance(owner, nn.Linear):
                owner.out_features, owner.in_features = owner.weight.shape
        try:
            adapter.resize(slim, {unit.kind: (unit.width + 1) // 2 for unit in layer.units})
        except Exception:  # an attribute that cannot be set
            return False
        return all(_equal(self.run(slim, grid), self.run(masked, grid)) for grid in self.grids)

    def mixing_of(self, adapter: Adapter) -> dict[UnitKind, Mixing]:
        """Return the mixing of q/k and v: ``rotate`` if a change of basis leaves the outputs unchanged."""
        mixing: dict[UnitKind, Mixing] = {}
        for unit in adapter.describe("", self.trial).units:
            turned = self.with_mixed_channels(unit)
            rotates = all(_equal(self.run(turned, grid), self.run(self.trial, grid)) for grid in self.grids)
            mixing[unit.kind] = "rotate" if rotates and unit.sharing == "own" else unit.mixing
        return mixing

    def with_mixed_channels(self, unit: Unit) -> nn.Module:
        turned = copy.deepcopy(self.trial)
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(unit.width, unit.width, generator=generator, dtype=torch.float64)
        inverse = torch.linalg.inv(basis).mT
        for axis in unit.axes:
            tensor = turned.get_parameter(axis.tensor).movedim(axis.dim, 0)
            rows = axis.rows(unit.heads, unit.width)[..., 0]
            mixed = basis if axis in unit.scale_axes else inverse
            tensor[rows] = torch.einsum("ij,hj...->hi...", mixed, tensor[rows])
        return turned

    def run(self, module: nn.Module, grid: tuple[int, int], **more: Any) -> list[Any] | None:
        try:
            output = module(*self.inputs(grid), **more)
        except Exception:  # of any kind: this code is not known
            return None
        outputs = list(output) if isinstance(output, tuple) else [output]
        return outputs if isinstance(outputs[0], Tensor) else None

    def inputs(self, grid: tuple[int, int]) -> list[Any]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, *grid, self.width, generator=generator, dtype=torch.float64)
        inputs: list[Any] = [x if self.as_map else x.flatten(1, 2)]
        for parameter in list(inspect.signature(self.trial.forward).parameters.values())[1:]:
            if parameter.default is not parameter.empty or parameter.kind.name.startswith("VAR"):
                break
            sizes = {"h": grid[0], "height": grid[0], "w": grid[1], "width": grid[1]}
            several = any(part in parameter.name for part in ("size", "shape", "dimensions", "resolution"))
            inputs.append(grid if several else sizes.get(parameter.name.lower()))
        return inputs


def _windows_of(module: nn.Module) -> Iterator[tuple[tuple[int, int], ...]]:
    for part in module.modules():
        side = getattr(part, "window_size", None)
        height, width = side if isinstance(side, tuple | list) else (side, side)
        if height and width:
            yield ((int(height), int(width)),)


def _own_forms(cls: type[nn.Module], form: Mapping[str, Any], module: nn.Module) -> Iterator[OwnForward]:
    heads = attrgetter(form["heads_at"])(module)
    width = module.get_submodule(form["read_by"]).in_features // heads
    kinds = {"d": width, "heads * d": heads * width, "scale": width**-0.5}
    found = [
        (owner, attribute, kind)
        for owner, part in module.named_modules()
        for attribute, value in vars(part).items()
        if type(value) in (int, float)
        and "num" not in attribute
        and attribute not in ("in_features", "out_features")
        for kind, size in kinds.items()
        if type(value) is type(size) and abs(value - size) < 1e-9
    ]
    of_heads = [place for place in found if place[2] != "heads * d" or "head" in place[1]]
    for sizes_at in dict.fromkeys((tuple(of_heads), tuple(found))):
        for cosine in (False, True):
            yield OwnForward(cls, sizes_at=sizes_at, cosine=cosine, scaled=not cosine, **form)
    tables = tuple(
        name for name, part in module.named_parameters() if part.dim() == 2 and part.shape[1] == width
    )
    if "rel_pos" in "".join(tables):
        unscaled = tuple(place for place in of_heads if place[2] != "scale")
        for scaled in (False, True):
            yield OwnForward(cls, sizes_at=unscaled, scaled=scaled, tables=tables, **form)


def _attention_forms(linears: Mapping[str, Any], module: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield possible fields of :class:`PlainAttention` for a module, likely candidates first."""
    heads = list(_head_counts(module))
    for reader in reversed([*linears]):
        width = linears[reader].in_features
        writers = [name for name in linears if name != reader]
        shapes = [linears[name].weight.shape for name in writers]
        if len(writers) == 1 and shapes[0][0] == 3 * width:
            forms = [({writers[0]: "qkv"}, per_head) for per_head in (False, True)]
        elif len(writers) == 3 and set(shapes) == {(width, shapes[0][1])}:
            # Names order the tries: q_proj, to_q, wq, query, ...
            named = sorted(writers, key=lambda name: _letter(name, writers))
            forms = [(dict(zip(order, "qkv", strict=True)), False) for order in permutations(named)]
        elif len(writers) == 2 and [rows for rows, _ in shapes] == [width, 2 * width]:
            forms = [(dict(zip(writers, ("q", "kv"), strict=True)), False)]
        else:
            continue
        for at in heads:
            if width % attrgetter(at)(module) == 0:
                for written_by, per_head in forms:
                    yield {
                        "written_by": written_by,
                        "per_head": per_head,
                        "read_by": reader,
                        "heads_at": at,
                    }


def _letter(name: str, others: list[str]) -> int:
    last = name.rpartition(".")[2].removeprefix("to_").removeprefix("w").removeprefix("lin_")
    return "qkv".find(last[:1]) if last[:1] in "qkv" else len(others)


def _head_counts(module: nn.Module) -> Iterator[str]:
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            counts = attribute in ("heads", "nhead", "n_head") or ("num" in attribute and "head" in attribute)
            if counts and type(value) is int and value > 0:
                yield f"{name}.{attribute}".lstrip(".")


def _mlp_forms(cls: type[nn.Module], module: nn.Module, linears: Mapping[str, Any]) -> Iterator[Mlp]:
    depthwise = tuple(
        name
        for name, part in module.named_children()
        if any(isinstance(p, nn.Conv2d) for p in part.modules())
    )
    for reader in reversed([*linears]):
        writers = tuple(name for name in linears if name != reader)
        rows = {linears[name].out_features for name in writers}
        inputs = {linears[name].in_features for name in writers}
        hidden = linears[reader].in_features
        # Tokens keep their width. Squeezing gates of channels and tables of positions do not.
        if inputs != {linears[reader].out_features} or len(writers) > 2:
            continue
        if rows == {hidden}:
            yield Mlp(cls, writers, reader, between=depthwise)
        elif rows == {2 * hidden} and len(writers) == 1:
            yield Mlp(cls, writers, reader, between=depthwise, halves=True)


def _equal(actual: list[Any] | None, expected: list[Any] | None) -> bool:
    if actual is None or expected is None:
        return False
    tensors = [[output for output in outputs if isinstance(output, Tensor)] for outputs in (actual, expected)]
    return len(tensors[0]) == len(tensors[1]) and all(map(are_equal, *tensors))


def are_equal(actual: Tensor, expected: Tensor) -> bool:
    """Whether two outputs differ only by rounding."""
    if actual.shape != expected.shape:
        return False
    return bool((actual - expected).abs().max() <= _TOLERANCE * expected.abs().max().clamp_min(1e-9))


def with_random_weights(module: nn.Module) -> nn.Module:
    """Return a float64 copy with random weights, because weights of 0 would hide a parameter."""
    trial = copy.deepcopy(module).cpu().double().requires_grad_(False)
    trial.eval()  # which some classes return nothing from
    generator = torch.Generator().manual_seed(0)
    for parameter in trial.parameters():
        scale = max(parameter[0].numel(), 1) ** -0.5 if parameter.dim() > 1 else 0.5
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return trial


def _structure_of(module: nn.Module) -> tuple[Any, ...]:
    parts: list[Any] = []
    for name, part in module.named_modules():
        values = [
            (key, repr(value)) for key, value in vars(part).items() if isinstance(value, int | float | str)
        ]
        tensors = (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
        parts.append((name, type(part), *values, *((key, tuple(tensor.shape)) for key, tensor in tensors)))
    return tuple(parts)
