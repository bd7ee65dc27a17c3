"""Comparison of a dense and a pruned model, by layer outputs and model outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.huggingface import as_huggingface, is_huggingface
from mhacut.checkpoint.identity import dense_args
from mhacut.checkpoint.load import read_model, states_its_model
from mhacut.errors import MhacutError, PlanError, UnsupportedModelError, UsageError, option_name
from mhacut.options.base import PathLike
from mhacut.plan import LayerFamily, UnitKind
from mhacut.pruning.preserve import Preserved
from mhacut.runtime.distributed import Processes
from mhacut.runtime.progress import Reporter
from mhacut.surgery.find import PrunableLayers, find_prunable_layers, gives_probabilities
from mhacut.surgery.flops import count_parameters, measure_flops_by_module
from mhacut.surgery.grid_merging import LineMatcher
from mhacut.surgery.hooks import registered
from mhacut.surgery.merging_blocks import Matcher
from mhacut.surgery.token_merging import Match
from mhacut.surgery.tokens import merged_of, tokens_of, with_tokens

_ADVICE = "Use the dense model that the checkpoint was made from"


def read_dense(
    source: PathLike, opened: Checkpoint, reporter: Reporter, part: str | None = None
) -> Checkpoint:
    """Read the model of ``--compare``. A file without an architecture gets the slim file's architecture."""
    identity = opened.identity
    architecture: dict[str, Any] = {}
    if not states_its_model(source, part):
        architecture = {"model": identity.architecture, "model_args": dense_args(identity)}
    dense = read_model(source, part=part, **architecture)
    if is_huggingface(opened):
        dense = as_huggingface(dense)
    compared = option_name("compare", dense.source)
    for what, expected, found in (
        ("the architecture", identity.architecture, dense.identity.architecture),
        ("image size", *("x".join(map(str, checkpoint.input_size)) for checkpoint in (opened, dense))),
    ):
        if found != expected:
            raise UsageError(f"{compared}: expected {what} {expected}, found {found}. {_ADVICE}")
    if opened.record is None and dense.record is not None:
        raise UsageError(
            f"{compared}: expected a dense model, found a slim file. Inspect the slim file, and compare it "
            f"with {opened.source}"
        )
    # A list: values of an untrusted history may not be hashable.
    if opened.record is not None and dense.sha256 not in [
        entry.get("source_sha256") for entry in opened.record.history
    ]:
        reporter.log(f"{dense.source} is not the file that {opened.source} was cut from")
    return dense


@dataclass(frozen=True)
class LayerComparison:
    name: str
    family: LayerFamily
    widths: Mapping[UnitKind, tuple[int, int]]
    """Channels per head of the (dense, slim) layer, by kind of channels."""
    flops: tuple[int, int]
    own_error: float
    """||slim - dense|| / ||dense|| of the layer's output, if both layers get the dense layer's input."""
    error: float
    """||slim - dense|| / ||dense|| of the layer's output in each model, including errors of earlier
    layers."""
    tokens: int = 0
    """Number of tokens per image that the slim layer computes."""


@dataclass(frozen=True)
class Comparison:
    dense: str
    flops: tuple[int, int]
    parameters: tuple[int, int]
    layers: tuple[LayerComparison, ...]
    agreement: float | None
    """Fraction of images for which both models have the same top-1 class; None for features."""
    divergence: float
    """KL(dense || slim) of the class probabilities in nats. For features, squared error divided by
    variance."""
    images: int
    data: str

    def outputs(self) -> str:
        if self.agreement is None:
            return f"features differ by {self.divergence:.2g} of their variance"
        same = f"{100 * self.agreement:.1f}% have the same top-1 class"
        return f"{same}, KL divergence {self.divergence:.2g} nats"


@torch.no_grad()
def compare(
    dense: nn.Module,
    slim: nn.Module,
    images: Tensor,
    *,
    source: str,
    data: str,
    batch_size: int,
    prunable: tuple[PrunableLayers, PrunableLayers] | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Comparison:
    """Run both models on ``images`` [n, C, H, W] and compare the outputs of every layer."""
    option = option_name("compare", source)
    try:  # layers are compared token by token, so both models need the same tokens
        same_tokens = with_tokens(dense, tokens_of(slim))
    except (PlanError, UnsupportedModelError) as error:
        text = f"{option}: cannot leave out the same tokens as the checkpoint ({error}). {_ADVICE}"
        raise MhacutError(text) from error
    prunable = prunable or (find_prunable_layers(same_tokens), find_prunable_layers(slim))
    _check_alike(*prunable, source)
    tallies = {layer.name: _Tally(layer.channel_dim) for layer in prunable[0].layers}
    device = next(dense.parameters()).device
    measured = Preserved.outputs_of(dense).fitted(dense, images, batch_size, Processes(0, 1, device))
    divergence = same = 0.0
    with registered(_LayerHooks(same_tokens, slim, tallies).register()):
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size].to(device)
            actual, dense_output = slim(batch).float(), same_tokens(batch).float()
            expected = dense_output if same_tokens is dense and not merged_of(dense) else dense(batch).float()
            if expected.shape != actual.shape:
                raise MhacutError(
                    f"{option}: expected {actual.shape[-1]} outputs per image, found {expected.shape[-1]}. "
                    f"{_ADVICE}"
                )
            divergence += float(measured.divergence(actual, expected)) * len(batch)
            same += float((expected.argmax(-1) == actual.argmax(-1)).sum())
            progress(start + len(batch), len(images))
    if not math.isfinite(divergence):
        raise MhacutError(f"{option}: 1 of the 2 models gives NaN or infinite outputs")
    flops = [_flops(model, images) for model in (dense, slim)]
    slim_units = {unit.key: unit for unit in prunable[1].units()}
    layers = []
    for layer in prunable[0].layers:
        both = [(unit, slim_units[unit.key]) for unit in layer.units if unit.key in slim_units]
        tally = tallies[layer.name]
        layers.append(
            LayerComparison(
                name=layer.name,
                family=layer.adapter.family,
                widths={unit.kind: (unit.width, cut.width) for unit, cut in both},
                flops=(flops[0].get(layer.name, 0), flops[1].get(layer.name, 0)),
                own_error=_relative(tally.own_square_error, tally.square),
                error=_relative(tally.square_error, tally.square),
                tokens=tally.tokens // len(images),
            )
        )
    return Comparison(
        dense=source,
        flops=(flops[0][""], flops[1][""]),
        parameters=(count_parameters(dense), count_parameters(slim)),
        layers=tuple(layers),
        agreement=same / len(images) if gives_probabilities(dense) else None,
        divergence=divergence / len(images),
        images=len(images),
        data=data,
    )


def _flops(model: nn.Module, images: Tensor) -> Mapping[str, int]:
    return measure_flops_by_module(model, tuple(images.shape[1:]))


class _Tally:
    """Sums of squared errors over the tokens of a layer, float64."""

    def __init__(self, channel_dim: int) -> None:
        self.channel_dim = channel_dim
        self.square = self.own_square_error = self.square_error = 0.0
        self.tokens = 0

    def add_own(self, dense: Any, slim: Any) -> None:
        dense, slim = _first(dense), _first(slim)
        self.own_square_error += float((slim - dense).double().square().sum())

    def add(self, dense: Any, slim: Any) -> None:
        expected, actual = _first(dense).double(), _first(slim).double()
        self.square += float(expected.square().sum())
        # Sums, so that memory holds outputs for 1 batch only.
        self.square_error += float((actual - expected).square().sum())
        self.tokens += expected.numel() // expected.shape[self.channel_dim]


def _first(output: Any) -> Any:
    """Return the tokens of a layer's output, which may also contain attention weights."""
    return output[0] if isinstance(output, tuple) else output


def _relative(square_error: float, square: float) -> float:
    return float((square_error / square) ** 0.5) if square > 0 else 0.0


class _LayerHooks:
    """Hooks that compare each layer's output in the slim and the dense model.

    The slim model must run first.
    """

    def __init__(self, dense: nn.Module, slim: nn.Module, tallies: Mapping[str, _Tally]) -> None:
        self.dense, self.slim, self.tallies = dense, slim, tallies
        self._slim_outputs: dict[str, Tensor] = {}
        self._matches: dict[str, Match | list[Match]] = {}
        self._on_dense_input = False
        """Whether a single slim layer runs on the input of the dense layer."""

    def register(self) -> Iterator[RemovableHandle]:
        for name in self.tallies:
            for model, hook in ((self.dense, self._dense_hook(name)), (self.slim, self._slim_hook(name))):
                yield model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
        for name in [
            name for name, module in self.slim.named_modules() if isinstance(module, Matcher | LineMatcher)
        ]:
            # The dense model merges the same tokens as the slim model.
            keep, take = partial(self._matches.__setitem__, name), partial(self._matches.pop, name, None)
            yield self.slim.get_submodule(name).register_forward_hook(lambda *call, keep=keep: keep(call[2]))
            yield self.dense.get_submodule(name).register_forward_hook(lambda *_, take=take: take())

    def _slim_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not self._on_dense_input:
                self._slim_outputs[name] = output

        return hook

    def _dense_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if name not in self._slim_outputs:
                return  # a second run of the dense model, with its own merges
            self.tallies[name].add(output, self._slim_outputs.pop(name))
            self._on_dense_input = True
            try:
                self.tallies[name].add_own(output, self.slim.get_submodule(name)(*args, **kwargs))
            finally:
                self._on_dense_input = False

        return hook


def _check_alike(dense: PrunableLayers, slim: PrunableLayers, source: str) -> None:
    heads = {unit.key: unit.heads for unit in dense.units()}
    odd = {layer.name for layer in slim.layers} ^ {layer.name for layer in dense.layers}
    odd |= {unit.layer for unit in slim.units() if heads.get(unit.key, unit.heads) != unit.heads}
    if odd:
        raise MhacutError(
            f"{option_name('compare', source)}: the layer {min(odd)} or its heads differ from the "
            f"checkpoint. {_ADVICE}"
        )
