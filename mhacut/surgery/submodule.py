"""Submodules as models: record how the whole model calls a submodule, and repeat the call on other inputs."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from mhacut.adapters.registry import adapter_for
from mhacut.errors import DataError, UnsupportedModelError, UsageError
from mhacut.surgery.find import find_prunable_layers

_PROBES = 4
"""Number of random projections of the loss values, each with its own gradient."""
_DIFFERENTIATED = 64
"""Minimum number of images for the gradients of a loss."""

Batches = Tensor | Mapping[str, Any] | Iterable[Any] | Callable[[], Any]
"""Batches for the model, or a function that runs the model on 1 batch."""

_Note = Callable[[str, Any, Any], None]


class SubmoduleFn(nn.Module):
    """Submodule as a function of images or tokens. Other arguments come from a recorded call."""

    def __init__(self, module: nn.Module, recorded: Recorded, outputs: Iterable[str]) -> None:
        super().__init__()
        self.module, self.call, self.place = module, recorded.call, recorded.place
        self.method = recorded.method
        self.alike = recorded.alike
        self.read = [recorded.outputs[name] for name in outputs]

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the selected outputs of the submodule, [B, ...] each, for its inputs [B, ...]."""
        leaves, structure = tree_flatten(self.call)
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                rows = (len(images), *leaf.shape[1:]) if number in self.alike else leaf.shape
                leaves[number] = leaf.to(images.device).expand(rows)
        leaves[self.place] = images
        args, kwargs = tree_unflatten(leaves, structure)
        run = self.module if self.method == "forward" else getattr(self.module, self.method)
        outputs = _floats(run(*args, **kwargs))
        return [outputs[number] for number in self.read]

    def forward(self, images: Tensor) -> Tensor:
        maps = self.maps(images)
        return maps[0] if len(maps) == 1 else torch.cat([output.flatten(1) for output in maps], dim=1)


@dataclass(frozen=True)
class Recorded:
    """Recorded calls of a submodule while the whole model runs."""

    call: Any
    """Positional and keyword arguments of the first call, with None in place of the images."""
    place: int
    """Index of the images (or tokens) in the flattened arguments of ``call``."""
    alike: tuple[int, ...]
    """Indices of the flattened tensor arguments whose rows are equal for all images, such as position
    embeddings repeated for a batch. ``call`` stores only 1 row of these arguments."""
    images: Tensor
    """Input images (or tokens) of all calls, [n, ...], float32, on the CPU."""
    left_out: int
    """Number of images that are not used, because their calls have other shapes or arguments."""
    outputs: Mapping[str, int]
    """Names of the submodule outputs that the whole model reads, each with its index among the outputs."""
    method: str
    """Name of the submodule's method that the model calls: ``forward``, or another of :data:`_METHODS`."""
    loss: Loss | None = None
    """Loss with its sensitivity to the submodule outputs; None without a loss function."""


@dataclass
class Loss:
    """Loss of the whole model, and its sensitivity to the outputs of a submodule.

    To first order, a change d of the outputs changes the loss by J d. For a random projection e of unit
    variance, the gradient g = J^T e has E[g g^T] = J^T J. Changes of different tokens are assumed to be
    independent.
    """

    of: Callable[[Any], Tensor]
    """Function from the model's output to the values to preserve, [B, ...]."""
    squares: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """Sum over images and tokens of g g^T, [C, C], for loss gradients g, by output name and channel
    dimension."""
    values: list[Tensor] = field(default_factory=list)
    """Values of the loss function for each batch, [B, ...] each."""
    images: int = 0

    def metric(self, name: str, channel_dim: int) -> Tensor:
        """Return M [C, C]. An output change d gives a relative squared error of the loss of mean d^T M d."""
        values = torch.cat([value.flatten() for value in self.values])
        scale = _PROBES * len(values) * values.var().clamp_min(1e-12)
        return self.squares[name, channel_dim] / scale

    def gradients(self, output: Any, named: Iterable[tuple[str, Tensor]]) -> list[Tensor | None]:
        """Add g g^T of the loss gradients g of ``output`` to ``squares``, and return the last gradients."""
        value, names, leaves = self.of(output), *zip(*named, strict=True)
        if not _is_float(value) or not value.ndim or not value.requires_grad:
            shape = f"{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(
                "loss: expected a tensor [images, ...] that depends on the pruned part, such as "
                f"`out.logits`, found {shape}"
            )
        chance = torch.Generator().manual_seed(self.images)
        self.values.append(value.detach().double())
        self.images += len(value)
        for _ in range(_PROBES):
            noise = torch.randn(value.shape, generator=chance).to(value)
            gradients = torch.autograd.grad(value, leaves, noise, retain_graph=True, allow_unused=True)
            for name, gradient in zip(names, gradients, strict=True):
                for dim in () if gradient is None else (1, -1)[gradient.ndim != 4 :]:
                    g = gradient.movedim(dim, -1).flatten(0, -2).double()
                    self.squares[name, dim] = self.squares.get((name, dim), 0) + g.mT @ g
        return list(gradients)


_METHODS = ("forward", "forward_features", "forward_intermediates", "get_intermediate_layers")
"""Methods of a submodule whose calls are recorded: torch's ``forward`` and timm's feature methods."""


class _StopForward(BaseException):
    """End of a model run. It is a BaseException, because models may catch Exception."""


@contextmanager
def _stopping_forward(model: nn.Module) -> Iterator[None]:
    """Catch :class:`_StopForward`, and restore each ``forward`` that transformers 4 replaced."""
    before = [(module, vars(module).get("forward")) for module in model.modules()]
    try:
        yield
    except _StopForward:
        for module, forward in before:
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward


def record(
    model: nn.Module,
    name: str,
    runs: Iterable[Callable[[], Any]],
    count: int,
    loss: Loss | None = None,
    *,
    stops: bool = False,
) -> Recorded:
    """Run a model until its submodule ``name`` has received ``count`` images, and return these calls."""
    part, found = model.get_submodule(name), Counter[Any]()
    calls: dict[Any, list[Tensor]] = {}
    first: dict[Any, tuple[Any, int, tuple[int, ...]]] = {}
    outputs: dict[str, int] = {}

    def note(method: str, args: Any, kwargs: Any) -> None:
        leaves, structure = tree_flatten((args, kwargs))
        places = [number for number, leaf in enumerate(leaves) if _is_float(leaf) and leaf.ndim > 2]
        if not places:
            raise UnsupportedModelError(
                f"{shown(name)}: expected a call with images or tokens, a float tensor [images, ...], found "
                "none. Name a module around it"
            )
        images = leaves[places[0]]
        leaves[places[0]] = None
        alike: list[int] = []
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                leaf = leaf.detach().float() if _is_float(leaf) else leaf
                if leaf.ndim and len(leaf) == len(images):
                    alike.append(number)
                    leaf = _one_of(leaf, name)
                leaves[number] = leaf
        others = [leaf.tolist() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        key = str(structure), images.shape[1:], repr(others), method
        first.setdefault(key, (tree_unflatten(leaves, structure), places[0], tuple(alike)))
        calls.setdefault(key, []).append(images.detach().float().cpu())
        found[key] += len(images)
        if ends:
            raise _StopForward

    ends = False  # the run, at the submodule
    for ran, run in enumerate(runs):
        try:
            if outputs and (loss is None or loss.images >= _DIFFERENTIATED):
                ends = stops and sum(map(len, calls.values())) == ran
                with torch.no_grad(), _stopping_forward(model), _watched(part, note, lambda output: output):
                    run()
            else:
                outputs |= _outputs_read(part, run, note, loss)
        except StopIteration:  # the function has no more batches
            break
        if not outputs or max(found.values()) >= count:
            break
    if not outputs:
        raise DataError(
            f"images: {shown(name)} was not called, or its output was not used. The model (or your function) "
            f"must call the submodule or its {', '.join(_METHODS[1:])}, not the modules inside"
        )
    key = found.most_common(1)[0][0]
    left_out = found.total() - found[key]
    return Recorded(*first[key], torch.cat(calls[key])[:count], left_out, outputs, key[-1], loss)


@contextmanager
def _watched(part: nn.Module, note: _Note, change: Callable[[Any], Any]) -> Iterator[None]:
    """Pass calls of submodule ``part`` to ``note``, and replace their outputs by ``change(output)``."""
    replaced, running = dict(vars(part)), False

    def watched(name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal running
        if running:
            return method(*args, **kwargs)
        running = True
        try:
            note(name, args, kwargs)
            return change(method(*args, **kwargs))
        finally:
            running = False

    for name in _METHODS:
        if hasattr(part, name):
            vars(part)[name] = partial(watched, name, getattr(part, name))
    try:
        yield
    finally:
        for name in _METHODS:
            vars(part).pop(name, None)
        vars(part).update({name: replaced[name] for name in _METHODS if name in replaced})


def _outputs_read(part: nn.Module, run: Callable[[], Any], note: _Note, loss: Loss | None) -> dict[str, int]:
    """Run 1 batch and return names and indices of the submodule outputs that the model or loss uses.

    A model without gradients counts as using all outputs.
    """
    leaves: list[tuple[str, int, Tensor]] = []

    def cut_off(output: Any) -> Any:
        flat, structure = tree_flatten(output)
        names = iter(_names(output))
        fresh = [leaf.detach().requires_grad_() if _is_float(leaf) else leaf for leaf in flat]
        floats = filter(_is_float, fresh)
        leaves.extend((next(names), number, leaf) for number, leaf in enumerate(floats))
        return tree_unflatten(fresh, structure)

    with _watched(part, note, cut_off), torch.enable_grad():
        output = run()
        result = [leaf.sum() for leaf in _floats(output) if leaf.requires_grad]
    tensors = [leaf for _, _, leaf in leaves]
    gradients: Any = tensors
    if loss is not None and tensors:
        gradients = loss.gradients(output, ((name, leaf) for name, _, leaf in leaves))
    elif result and tensors:
        gradients = torch.autograd.grad(torch.stack(result).sum(), tensors, allow_unused=True)
    return {
        name: number for (name, number, _), used in zip(leaves, gradients, strict=True) if used is not None
    }


def _names(output: Any) -> list[str]:
    entries = output.items() if isinstance(output, Mapping) else [("output", output)]
    names = []
    for name, value in entries:
        several = _floats(value)
        names += [f"{name}[{number}]" if len(several) > 1 else str(name) for number in range(len(several))]
    return names


def _floats(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if _is_float(leaf)]


def _is_float(leaf: Any) -> bool:
    # segmentation_models_pytorch's encoders return maps of 0 channels.
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() > 0


def _one_of(tensor: Tensor, name: str) -> Tensor:
    if bool((tensor != tensor[:1]).any()):
        raise UnsupportedModelError(
            f"{shown(name)}: expected 1 tensor that differs between images, found a second, "
            f"{list(tensor.shape)}, such as a mask. Use images of one size, or name a module inside"
        )
    return tensor[:1]


def shown(name: str) -> str:
    return f"`{name}`" if name else "the model"


def vision_transformers(model: nn.Module) -> list[str]:
    names = set()
    for name, module in model.named_modules():
        adapter = adapter_for(module)
        if adapter is not None and adapter.family == "attention":
            while name and not _embeds_patches(model.get_submodule(name)):
                name = name.rpartition(".")[0]
            names.add(name)
    # A decoder's attention leads to the module that also holds the backbone.
    return sorted(
        name
        for name in names
        if not any(f"{other}.".startswith(name and f"{name}.") for other in names - {name})
    )


def _embeds_patches(module: nn.Module) -> bool:
    inside = (name for name, _ in module.named_modules())
    return hasattr(module, "forward_features") or any("patch_embed" in name for name in inside)


def record_submodule(
    model: nn.Module, name: str, images: Batches, count: int, loss: Callable[[Any], Tensor] | None = None
) -> tuple[Recorded, nn.Module]:
    """Run ``model`` until submodule ``name`` has received ``count`` images.

    Return its calls and a copy of it.
    """
    with _in_eval_mode(model):
        stops = not callable(images)  # a function may go on after its forward pass
        sensitivity = None if loss is None else Loss(loss)
        recorded = record(model, name, _runs(model, images), count, sensitivity, stops=stops)
        dense = copy.deepcopy(model.get_submodule(name)).float().requires_grad_(False)
        for layer in find_prunable_layers(dense).layers:
            layer.adapter.prepare(dense.get_submodule(layer.name))
        return recorded, dense


def _runs(model: nn.Module, images: Batches) -> Iterator[Callable[[], Any]]:
    if callable(images):
        while True:
            yield images
    device = next(model.parameters()).device
    for batch in [images] if isinstance(images, Tensor | Mapping) else images:

        def run(batch: Any = batch) -> Any:
            given = batch[0] if isinstance(batch, tuple | list) else batch
            given = dict(given) if isinstance(given, Mapping) else given
            given = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, given)
            return model(**given) if isinstance(given, dict) else model(given)

        yield run


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
