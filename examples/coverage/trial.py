"""One architecture of timm, cut on paper: everything that shapes alone can tell."""

from __future__ import annotations

import copy
import json
import re
import struct
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from meta import Remembering, TraceableOnMeta, products
from torch import nn

from mhacut.adapters.registry import is_pooling_head, is_position_bias
from mhacut.checkpoint.build import shapes_of
from mhacut.checkpoint.identity import identity_of
from mhacut.checkpoint.load import open_checkpoint
from mhacut.checkpoint.record import METADATA_KEY, SlimRecord
from mhacut.commands.models import CatalogueEntry, build_weightless, entry_of
from mhacut.data.preprocessing import Preprocessing
from mhacut.plan import Plan, UnitPlan
from mhacut.surgery.channels import axes_of
from mhacut.surgery.costs import build_cost_table
from mhacut.surgery.find import PrunableLayers, find_prunable_layers, model_input_size
from mhacut.surgery.flops import count_parameters, measure_flops, weightless
from mhacut.surgery.slice import cut

BATCH = 2
_DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}
_KINDS = {"attention": {"qk", "v"}, "mlp": {"hidden"}}


@dataclass
class Outcome:
    """What became of one architecture."""

    architecture: str
    tags: tuple[str, ...]
    """timm's pretrained weights."""
    model_class: str = ""
    parameters: int = 0
    entry: CatalogueEntry | None = None
    """What mhacut says of it; None where it could not be built."""
    mlps: tuple[str, ...] = ()
    """Classes of MLPs that can be cut."""
    whole_attention: int = 0
    """Attention layers of which q/k or v is left whole."""
    flops: tuple[int, int] | None = None
    """Dense, and with every unit at half its width."""
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def signature(self) -> tuple[Any, ...]:
        """Architectures of one signature are cut by the same code; layers are not counted in it."""
        entry = self.entry
        if entry is None:
            return (self.architecture,)
        reasons = sorted({reason_of(line) for line in entry.not_prunable})
        refusal = (entry.refusal or "").partition(" (first at")[0]
        return self.model_class, entry.attention, self.mlps, entry.kinds, tuple(reasons), refusal


def reason_of(not_prunable: str) -> str:
    """A line of ``not_prunable`` without the names and the number of the layers.

    >>> reason_of("blocks.0.mlp (OtherMlp): this MLP class is not supported (2 layers)")
    '(OtherMlp): this MLP class is not supported'
    >>> reason_of("head (MlpHead): it is left alone"), reason_of("qk: normalised (blocks.3.attn)")
    ('(MlpHead): it is left alone', 'qk: normalised')
    """
    return re.sub(r"^\S+ \(", "(", re.sub(r" \(\S+\)$| \(\d+ layers[^)]*\)$", "", not_prunable))


def examine(architecture: str, tags: Sequence[str] = ()) -> Outcome:
    """Cut ``architecture`` in every way that needs no weights; what goes wrong is in the outcome.

    Args:
        architecture: timm's name.
        tags: of timm's pretrained weights, for the outcome.
    """
    outcome = Outcome(architecture, tuple(tags))
    began = time.perf_counter()
    with warnings.catch_warnings(), torch.no_grad(), _told(outcome, "crash"):
        warnings.simplefilter("ignore")
        model = build_weightless(architecture).eval()
        outcome.model_class = type(model).__name__
        outcome.parameters = count_parameters(model)
        outcome.entry = entry_of(architecture, model, outcome.tags)
        if outcome.entry.refusal is None:
            _examine_cut(outcome, model)
        elif not outcome.entry.transformer:
            _examine_without_attention(outcome, model)
    outcome.seconds = time.perf_counter() - began
    return outcome


def half_plan(prunable: PrunableLayers, seed: int) -> Plan:
    """Half the channels of every unit, by chance, each head its own; in shared units by a coin."""
    generator = torch.Generator().manual_seed(seed)
    units = []
    for unit in prunable.units():
        width = max(unit.width // 2, 1)
        rows = [
            torch.randperm(unit.width, generator=generator)[:width].sort().values for _ in range(unit.heads)
        ]
        own = unit.sharing == "own" or (
            unit.sharing == "copied" and bool(torch.randint(2, (), generator=generator))
        )
        kept = torch.stack(rows if own else rows[:1] * unit.heads).tolist()
        chosen, unshared = tuple(map(tuple, kept)), own and unit.sharing == "copied"
        units.append(UnitPlan(unit.layer, unit.kind, unit.width, chosen, unshared=unshared))
    return Plan(tuple(units))


def _examine_cut(outcome: Outcome, model: nn.Module) -> None:
    prunable = find_prunable_layers(model)
    outcome.mlps = _classes(model, prunable, "mlp")
    for layer in prunable.layers:
        told = {unit.kind for unit in layer.units} | set(layer.not_prunable) | set(layer.coupled_with)
        cls = type(model.get_submodule(layer.name)).__name__
        missing = _KINDS[layer.adapter.family] - told
        if missing in ({"qk"}, {"v"}):
            kind = {"qk": "q and k", "v": "v"}[missing.pop()]
            outcome.notes.append(f"{cls} has no channels of {kind} alone")
        elif missing:
            outcome.failures.append(f"{layer.name} ({cls}): nothing is said of {', '.join(sorted(missing))}")
        whole = {"qk", "v"} & set(layer.not_prunable)
        outcome.whole_attention += layer.adapter.family == "attention" and bool(whole)
    outcome.notes = list(dict.fromkeys(outcome.notes))

    with _told(outcome, "keeping everything"):
        untouched = copy.deepcopy(model)
        cut(
            untouched,
            Plan(tuple(u.keep_first(u.width) for u in prunable.units())),
        )
        if shapes_of(untouched) != shapes_of(model):
            outcome.failures.append("keeping everything: names or shapes changed")

    plan, slim = half_plan(prunable, zlib.crc32(outcome.architecture.encode())), copy.deepcopy(model)
    with _told(outcome, "the cut"):
        cut(slim, plan)
        _check_narrower(outcome, model, slim, prunable, plan)
        with _told(outcome, "forward and FLOPs"):
            ran = _check_run(outcome, model, slim, prunable)
            _check_flops(outcome, *ran, prunable, plan)
        with _told(outcome, "the file"):
            _check_file(outcome, model, slim, plan)


def _check_narrower(
    outcome: Outcome, model: nn.Module, slim: nn.Module, prunable: PrunableLayers, plan: Plan
) -> None:
    """Every tensor that a unit names became smaller, no name was lost, and mhacut still knows the layer."""
    before, after = shapes_of(model), shapes_of(slim)
    if list(before) != list(after):
        outcome.failures.append("the cut: tensors have other names or another order")
    left = {unit.key: (unit.heads, unit.width) for unit in find_prunable_layers(slim).units()}
    if left != {unit.key: (unit.heads, unit.width) for unit in plan}:
        outcome.failures.append("the cut: the slim model is not seen to have the planned widths")
    whole = plan.widths()
    for unit in prunable.units():
        if unit.width == whole[unit.key]:
            outcome.notes.append(f"{unit.layer} ({unit.kind}): a single channel, which stays")
            continue
        module, smaller = model.get_submodule(unit.layer), slim.get_submodule(unit.layer)
        for axis in axes_of(unit):
            old, new = _size(module, axis.tensor, axis.dim), _size(smaller, axis.tensor, axis.dim)
            if not new < old and not axis.shared:
                outcome.failures.append(f"{unit.layer}.{axis.tensor}: not narrower, {old} to {new}")
    if not count_parameters(slim) < count_parameters(model):
        outcome.failures.append("the cut: not fewer parameters")


def _check_run(
    outcome: Outcome, model: nn.Module, slim: nn.Module, prunable: PrunableLayers
) -> tuple[nn.Module, nn.Module]:
    """The slim model gives what the dense model gives; returns both, on a device that they run on."""
    size = _input_size(model)
    try:
        with products(model) as found:
            expected = _output_shapes(model, size)
    except Exception as error:  # whatever timm does that the meta device cannot
        outcome.notes.append(f"the dense model does not run on the meta device: {_short(error)}")
        model, slim = weightless(model), weightless(slim)
        with products(model) as found:
            expected = _output_shapes(model, size)
    covered = [layer.name for layer in prunable.layers] + _left_alone(model)
    unseen = [name for name in found if not any(f"{name}.".startswith(f"{own}.") for own in covered)]
    if unseen:
        outcome.failures.append(
            f"silently left whole: activations are multiplied in {unseen[0] or 'the model itself'} "
            f"({type(model.get_submodule(unseen[0])).__name__}, {len(unseen)} modules)"
        )
    with Remembering():
        given = _output_shapes(slim, size)
    if given != expected:
        outcome.failures.append(f"the slim model's output is {given}, expected {expected}")
    classes = int(getattr(model, "num_classes", 0) or 0)
    if classes and expected != [(BATCH, classes)]:
        outcome.notes.append(f"the dense model's output is {expected}, not {classes} classes")
    return model, slim


def _check_flops(
    outcome: Outcome, model: nn.Module, slim: nn.Module, prunable: PrunableLayers, plan: Plan
) -> None:
    """The slim model costs what mhacut's table promises."""
    size = _input_size(model)
    with TraceableOnMeta():
        table = build_cost_table(model, prunable, size)
        counted = measure_flops(slim, size)
    promised = int(table.flops(plan.widths()))
    outcome.flops = (table.dense, counted)
    if promised != counted:
        outcome.failures.append(f"FLOPs: {promised} promised, {counted} counted")
    if int(table.flops({})) != table.dense:
        outcome.failures.append(
            f"FLOPs of the dense model: {int(table.flops({}))} in the table, {table.dense} counted"
        )
    if not counted < table.dense:
        outcome.failures.append(f"FLOPs: not fewer, {table.dense} to {counted}")
    asleep = len(prunable.layers) - len(table.layers)
    if asleep:
        outcome.notes.append(f"{asleep} layers do not run")


def _check_file(outcome: Outcome, model: nn.Module, slim: nn.Module, plan: Plan) -> None:
    """A slim file without its weights says which model it is: the shapes are made anew from its record."""
    identity = identity_of(model, outcome.architecture, {})
    preprocessing = Preprocessing.resolve(identity.pretrained_cfg, _input_size(model))
    record = SlimRecord(identity, plan, preprocessing.to_json(), ())
    with tempfile.TemporaryDirectory(prefix="coverage-") as folder:
        path = Path(folder, "slim.safetensors")
        _write_hollow(path, slim, {"format": "pt", METADATA_KEY: record.to_json()})
        skeleton = open_checkpoint(path).skeleton
    if shapes_of(skeleton) != shapes_of(slim):
        outcome.failures.append("the file: the record gives other shapes")


def _examine_without_attention(outcome: Outcome, model: nn.Module) -> None:
    """A model said to have no attention multiplies no activations."""
    try:
        with products(model) as found:
            _output_shapes(model, _input_size(model))
    except Exception as error:
        outcome.notes.append(f"does not run on the meta device: {_short(error)}")
        return
    if found:
        name = next(iter(found))
        outcome.notes.append(
            f"said to have no attention, but activations are multiplied in {name or 'the model itself'} "
            f"({type(model.get_submodule(name)).__name__})"
        )


def _write_hollow(path: Path, model: nn.Module, metadata: dict[str, str]) -> None:
    """A safetensors file with a hole where the weights would be, which takes no room on the disk."""
    document: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in model.state_dict().items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        document[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    header = json.dumps(document).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)


_TRANSFORMS = frozenset({"Dct1d", "Gemma4PatchEmbed", "Gemma4RotaryEmbedding2D", "Gemma4VisionPooler"})
"""They multiply by matrices that no image makes: cosines, positions as one-hot rows, means over places."""


def _left_alone(model: nn.Module) -> list[str]:
    """Names of modules that multiply activations and are no attention inside the body."""
    return [
        name
        for name, module in model.named_modules()
        if is_pooling_head(module) or is_position_bias(module) or type(module).__name__ in _TRANSFORMS
    ]


def _classes(model: nn.Module, prunable: PrunableLayers, family: str) -> tuple[str, ...]:
    layers = [layer for layer in prunable.layers if layer.adapter.family == family and layer.units]
    return tuple(sorted({type(model.get_submodule(layer.name)).__name__ for layer in layers}))


def _size(module: nn.Module, tensor: str, dim: int) -> int:
    owner, _, name = tensor.rpartition(".")
    found: torch.Tensor = getattr(module.get_submodule(owner), name)
    return found.shape[dim]


def _input_size(model: Any) -> tuple[int, int, int]:
    cfg = model.pretrained_cfg
    return Preprocessing.resolve(cfg, model_input_size(model, cfg)).input_size


def _output_shapes(model: nn.Module, size: tuple[int, int, int]) -> list[tuple[int, ...]]:
    device = next(model.parameters()).device
    output = model(torch.zeros((BATCH, *size), device=device))
    return [tuple(tensor.shape) for tensor in (output if isinstance(output, list | tuple) else [output])]


@contextmanager
def _told(outcome: Outcome, stage: str) -> Iterator[None]:
    """An exception becomes a failure of ``outcome``."""
    try:
        yield
    except Exception as error:  # that of any architecture, so that the others are looked at too
        outcome.failures.append(f"{stage}: {_short(error)}")


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
