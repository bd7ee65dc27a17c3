"""The options of every command: one place for names, defaults and limits. Flags and YAML keys are these."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_type_hints

from mhacut.errors import UsageError

Scope = Literal["attention", "attention+mlp"]
Init = Literal["attention-difference", "uniform"]
Temperature = Literal["kept", "dense"]
Selection = Literal["repair", "indicator"]
BasisChoice = Literal["auto", "channel", "principal"]
Positions = Literal["auto", "own", "equal"]
Allocation = Literal["curves", "indicator", "refined", "uniform"]
Effort = Literal["fast", "balanced", "best"]
Sort = Literal["layer", "flops", "params", "qk", "v", "similarity", "rank"]
ExportFormat = Literal["onnx", "pt2", "timm"]
Runtime = Literal["eager", "compile", "onnx"]
ExportDtype = Literal["float32", "float16", "bfloat16"]
PathLike = str | os.PathLike[str]

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on


@dataclass(frozen=True)
class PreprocessingOptions:
    """Overrides of what the checkpoint states about its images; None keeps that."""

    mean: tuple[float, ...] | None = None
    """Per channel, in units of a pixel range of 0..1."""
    std: tuple[float, ...] | None = None
    """Per channel."""
    crop_pct: float | None = None
    """Share of the image that the centre crop keeps."""
    interpolation: str | None = None
    """``bicubic``, ``bilinear``, ..."""
    img_size: int | None = None
    """Height and width in pixels."""


@dataclass(frozen=True)
class LabelledImages:
    """Where images to measure accuracy on come from."""

    data_dir: PathLike | None = None
    """An ImageFolder with ``train/`` and ``val/``, or a flat folder of unlabelled images."""
    dataset: str | None = None
    """A dataset as timm names it: ``hfds/NAME``, ``wds/NAME``, ``torch/NAME``, ``tfds/NAME``."""
    class_map: PathLike | None = None
    """Text file with the class names in the order of the model's head."""
    val_split: str = "val"
    """Split to measure accuracy on."""
    workers: int = 2
    """Processes that load images."""


@dataclass(frozen=True)
class DataOptions(LabelledImages):
    """Where images come from, those to search on too."""

    train_split: str = "train"
    """Split to search on."""


@dataclass(frozen=True)
class SearchOptions:
    """How to search; every ingredient can be switched off for ablation."""

    effort: Effort = "balanced"
    """How much work to put in where nothing else is said: see :data:`EFFORTS`."""
    allocation: Allocation = "curves"
    """How the budget is spread over layers and kinds: by error curves, by trained indicators (the paper's
    way), by indicators that start from the curves' plan, where they do better on held-back images, or the
    same share everywhere."""
    basis: BasisChoice = "auto"
    """What a channel is: one of the model's own, a principal one where the algebra allows it, or, per unit,
    that which leaves the smaller error on held-back images."""
    positions: Positions = "auto"
    """Which v channels heads keep that share the filters of a convolution (focused linear attention): each
    its own, with a copy of the filters, the same positions in all, or, per unit, that which leaves the
    smaller error on held-back images. (In multi-query attention there is no room for copies: equal.)"""
    similarity: bool = True
    """Weight indicators by how unlike the other channels of its head a channel is."""
    score_adjustment: bool = True
    """Hold the widths of all heads equal while training; off, only the final plan does."""
    init: Init = "attention-difference"
    """Where indicators start."""
    reweight: bool = True
    """Train a gain per kept channel, merged into the weights."""
    temperature: Temperature = "kept"
    """Softmax scale of a cut layer while searching, and where repair does not fit a better one:
    1/sqrt(kept width), or the dense model's."""
    steps: int = 60
    """Optimiser steps of the indicators, where they are trained."""
    gain_steps: int | None = None
    """Optimiser steps of the gains on the final plan; None is :data:`UNREPAIRED_GAIN_STEPS` without repair,
    and none with it."""
    tuning_steps: int | None = None
    """Optimiser steps that tune all weights of the slim model on the calibration images, with the dense model
    as teacher; None is what the effort says."""
    batch_size: int = 16
    """Images at a time."""
    lr: float = 0.01
    """Adam's, for indicators."""
    gain_lr: float = 0.003
    """Adam's, for gains."""
    tuning_lr: float = 3e-5
    """Adam's, for tuning."""
    budget_weight: float = 1.0
    """Weight of the budget's gradient against the task's, both at unit scale."""
    label_weight: float = 0.1
    """Weight of the cross-entropy beside the distillation loss, where there are labels."""
    repair: bool = True
    """Refit, in closed form, what reads a cut layer."""
    swap_moves: bool | None = None
    """Swap kept v and hidden channels for others once widths are known, as long as that leaves less error
    after the repair; None is what the effort says."""
    repair_in_order: bool | None = None
    """Refit once more, in order, each layer on what the layers cut before it give; None is what the effort
    says."""
    token_weights: bool = True
    """Count each token as much as it influences the answer, in what is fitted and judged; off, all alike."""
    selection: Selection = "repair"
    """Which channels fill the widths found: those that serve best once repaired, or the best indicators,
    where they are trained."""
    seed: int = 42
    """Of everything random."""

    def __post_init__(self) -> None:
        require_choice("--effort", self.effort, get_args(Effort))
        require_choice("--allocation", self.allocation, get_args(Allocation))
        require_choice("--basis", self.basis, get_args(BasisChoice))
        require_choice("--positions", self.positions, get_args(Positions))
        require_choice("--init", self.init, get_args(Init))
        require_choice("--temperature", self.temperature, get_args(Temperature))
        require_choice("--selection", self.selection, get_args(Selection))
        require("--steps", self.steps, self.steps >= 1, "at least 1")
        gain_steps = 0 if self.gain_steps is None else self.gain_steps
        require("--gain-steps", gain_steps, gain_steps >= 0, "at least 0")
        require("--batch-size", self.batch_size, self.batch_size >= 1, "at least 1")
        require("--tuning-steps", self.tuned_steps, self.tuned_steps >= 0, "at least 0")
        for flag, value in (
            ("--lr", self.lr),
            ("--gain-lr", self.gain_lr),
            ("--tuning-lr", self.tuning_lr),
        ):
            require(flag, value, 0 < value < float("inf"), "above 0")
        for flag, value in (("--budget-weight", self.budget_weight), ("--label-weight", self.label_weight)):
            require(flag, value, 0 <= value < float("inf"), "at least 0")
        if self.selection == "indicator" and self.by_indicators:
            own = self.basis != "principal"
            require("--basis", self.basis, own, "channel with --selection indicator, whose choice it keeps")

    @property
    def by_indicators(self) -> bool:
        """Whether indicators are trained."""
        return self.allocation in ("indicator", "refined")

    @property
    def trained_gain_steps(self) -> int:
        """Steps that train only gains."""
        if not self.reweight:
            return 0
        if self.gain_steps is not None:
            return self.gain_steps
        return 0 if self.repair else UNREPAIRED_GAIN_STEPS

    @property
    def swaps(self) -> bool:
        """Whether kept channels are swapped for others."""
        asked = EFFORTS[self.effort].swap_moves if self.swap_moves is None else self.swap_moves
        return self.repair and asked

    @property
    def repairs_in_order(self) -> bool:
        """Whether readouts are refitted on what the cut model gives them."""
        asked = EFFORTS[self.effort].repair_in_order if self.repair_in_order is None else self.repair_in_order
        return self.repair and asked

    @property
    def tuned_steps(self) -> int:
        """Steps that tune all weights."""
        return EFFORTS[self.effort].tuning_steps if self.tuning_steps is None else self.tuning_steps

    def idle(self) -> dict[str, str]:
        """Fields that were changed to no effect, each with the reason."""
        found: dict[str, str] = {}
        if not self.by_indicators:
            reason = f"--allocation {self.allocation} trains no indicators"
            found |= dict.fromkeys(_OF_INDICATORS, reason)
        elif self.allocation == "refined":
            reason = "--allocation refined starts from the plan of the curves"
            found |= dict.fromkeys(("similarity", "init"), reason)
            found["selection"] = "--allocation refined keeps what serves best once repaired"
        if not self.reweight:
            found |= dict.fromkeys(("gain_steps", "gain_lr"), "--no-reweight trains no gains")
        elif self.trained_gain_steps == 0 and not self.by_indicators:
            found["gain_lr"] = "no gains are trained; see --gain-steps"
        if self.gain_steps is None and self.repair and not self.by_indicators:
            found["reweight"] = "after a repair no gains are trained unless --gain-steps asks for it"
        if not self.repair:
            found |= dict.fromkeys(("repair_in_order", "swap_moves"), "--no-repair refits nothing")
        elif self.allocation == "indicator" and self.selection == "indicator":
            found["swap_moves"] = "--selection indicator keeps the indicators' choice"
        if self.tuned_steps == 0:
            found["tuning_lr"] = "nothing is tuned; see --tuning-steps"
        return {name: found[name] for name in found if name in _changed(self)}


_OF_INDICATORS = (
    "similarity",
    "score_adjustment",
    "init",
    "steps",
    "lr",
    "budget_weight",
    "label_weight",
    "selection",
)


@dataclass(frozen=True)
class Work:
    """What an effort amounts to."""

    calibration_images: int
    sensitivity_share: float
    """Of the calibration images that are differentiated, of those to fit."""
    swap_moves: bool
    repair_in_order: bool
    tuning_steps: int


EFFORTS: Mapping[str, Work] = {
    "fast": Work(
        calibration_images=128, sensitivity_share=0.5, swap_moves=False, repair_in_order=False, tuning_steps=0
    ),
    "balanced": Work(
        calibration_images=256, sensitivity_share=1.0, swap_moves=False, repair_in_order=True, tuning_steps=0
    ),
    "best": Work(
        calibration_images=1024,
        sensitivity_share=0.5,
        swap_moves=True,
        repair_in_order=True,
        tuning_steps=400,
    ),
}

UNREPAIRED_GAIN_STEPS = 40
"""Gains are worth training where nothing else makes up for a cut; after a repair few of them hold on images
that they were not trained on."""


class Flat:
    """Options in groups that are also known by flat names, as flags and YAML keys have them."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @classmethod
    def _groups(cls) -> dict[str, type[Any]]:
        """The fields that are dataclasses themselves, with their class."""
        return {
            name: kind
            for name, kind in get_type_hints(cls).items()
            if isinstance(kind, type) and is_dataclass(kind)
        }

    @classmethod
    def types(cls) -> dict[str, Any]:
        """Every name :meth:`from_flat` takes, with its type."""
        hints = get_type_hints(cls)
        types = {name: hints[name] for name in cls.__dataclass_fields__ if name not in cls._groups()}
        for group in cls._groups().values():
            types |= {name: get_type_hints(group)[name] for name in group.__dataclass_fields__}
        return types

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Per flat name what holds when it is not given; names that must be given are left out."""
        fields = {name: item for name, item in cls.__dataclass_fields__.items() if name not in cls._groups()}
        for group in cls._groups().values():
            fields |= group.__dataclass_fields__
        return {
            name: item.default if item.default is not MISSING else item.default_factory()
            for name, item in fields.items()
            if item.default is not MISSING or item.default_factory is not MISSING
        }

    @classmethod
    def from_flat(cls, **values: Any) -> Self:
        """Options from names as the flags have them, all on one level.

        >>> PruneOptions.from_flat(checkpoint="vit.safetensors", flops="50%", steps=10).search.steps
        10

        Raises:
            UsageError: a name that is no option, with the one it resembles.
        """
        own = dict(values)
        known = tuple(cls.types())
        for name in own:
            if name not in known:
                raise UsageError(unknown_option(name, known))
        groups = {
            name: group(**{key: own.pop(key) for key in list(own) if key in group.__dataclass_fields__})
            for name, group in cls._groups().items()
        }
        return cls(**own, **groups)

    def flat(self) -> dict[str, Any]:
        """The inverse of :meth:`from_flat`; paths as text, for a record that JSON can hold."""
        values: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            grouped = name in self._groups()
            values |= (
                {key: getattr(value, key) for key in value.__dataclass_fields__} if grouped else {name: value}
            )
        return {
            key: os.fspath(value) if isinstance(value, os.PathLike) else value
            for key, value in values.items()
        }


@dataclass(frozen=True)
class CheckpointOptions(Flat):
    """Which checkpoint, and what its file does not say."""

    checkpoint: PathLike
    """``.safetensors``, ``.pth``, a timm folder, a slim file, or ``timm:NAME``."""
    model: str | None = None
    """timm architecture of a bare checkpoint."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for that architecture, ``{"img_size": 32}``."""
    num_classes: int | None = None
    """Only asserted: the head's size is read from the file."""


@dataclass(frozen=True, kw_only=True)
class PruneOptions(CheckpointOptions):
    """Everything ``mhacut prune`` can be told."""

    flops: str
    """``2.0G``, ``600M``, ``2e9`` or ``50%``; one FLOP is one multiply-accumulate."""
    output: PathLike | None = None
    """The file to write; None is ``<stem>-<budget>.safetensors`` in the working directory."""
    overwrite: bool = False
    """Replace an existing file; the input is never replaced."""
    dry_run: bool = False
    """Find the plan, write no slim file."""
    report: PathLike | None = None
    """A page to write about the run, a dry one too."""
    scope: Scope = "attention+mlp"
    """What may be cut."""
    round_to: int = 8
    """Widths are multiples of it."""
    calibration_images: int | None = None
    """How many images to search on; None is what the effort says."""
    labels: bool = True
    """Use labels where there are any; off, distillation only."""
    eval_images: int = 2000
    """How many validation images to measure accuracy on; 0 for none."""
    latency: bool = True
    """Measure latency before and after."""
    latency_batch_size: int = 8
    """Images at a time when it is measured."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:N``."""
    amp: bool = False
    """bfloat16 autocast where indicators, gains or weights are trained."""
    data: DataOptions = field(default_factory=DataOptions)
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)
    search: SearchOptions = field(default_factory=SearchOptions)

    def __post_init__(self) -> None:
        if self.output is not None:
            name = os.fspath(self.output)
            require("--output", name, name.endswith(".safetensors"), "a name that ends in .safetensors")
        if self.report is not None:
            _require_page("--report", self.report)
        require_choice("--scope", self.scope, get_args(Scope))
        require("--round-to", self.round_to, self.round_to >= 1, "at least 1")
        require("--calibration-images", self.images_wanted, self.images_wanted >= 1, "at least 1")
        require("--latency-batch-size", self.latency_batch_size, self.latency_batch_size >= 1, "at least 1")
        require("--eval-images", self.eval_images, self.eval_images >= 0, "at least 0")

    @property
    def images_wanted(self) -> int:
        """``calibration_images``, or what the effort says."""
        if self.calibration_images is not None:
            return self.calibration_images
        return EFFORTS[self.search.effort].calibration_images

    def idle(self) -> dict[str, str]:
        """Options that were changed to no effect, each with the reason."""
        search = self.search
        found = search.idle()
        if self.amp and not (search.by_indicators or search.trained_gain_steps or search.tuned_steps):
            found["amp"] = "nothing is trained"
        if self.data.data_dir is None and self.data.dataset is None:
            there = "there are no images without --data-dir or --dataset"
            found |= dict.fromkeys(_changed(self.data), there)
            found |= dict.fromkeys({"labels", "eval_images"}.intersection(_changed(self)), there)
        return found


def _changed(options: Any) -> list[str]:
    """Fields that differ from their plain defaults."""
    return [
        field.name
        for field in fields(options)
        if field.default is not MISSING and getattr(options, field.name) != field.default
    ]


@dataclass(frozen=True)
class EvaluateOptions(CheckpointOptions):
    """Everything ``mhacut evaluate`` can be told."""

    batch_size: int = 64
    """Images at a time."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:N``."""
    amp: bool = False
    """bfloat16 autocast."""
    data: LabelledImages = field(default_factory=LabelledImages)
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)

    def __post_init__(self) -> None:
        require("--batch-size", self.batch_size, self.batch_size >= 1, "at least 1")


@dataclass(frozen=True)
class InspectOptions(CheckpointOptions):
    """Everything ``mhacut inspect`` can be told."""

    layer: str | None = None
    """Only layers whose name fits, ``blocks.1?.attn``; heads are shown one by one."""
    heads: bool = False
    """Show heads one by one, and the channels they keep or would keep."""
    sort: Sort = "layer"
    """Order of layers, and of heads where it tells them apart: as in the model, or the largest first."""
    shapes: bool = False
    """Look at shapes alone: no weight is read."""
    html: PathLike | None = None
    """A page to write the report to."""
    png: PathLike | None = None
    """A picture to draw the report's charts on; needs ``mhacut[plot]``."""
    overwrite: bool = False
    """Replace these files if they exist."""
    compare: PathLike | None = None
    """A dense checkpoint to lay beside, layer by layer; without images, on synthetic ones."""
    data_dir: PathLike | None = None
    """Images to judge heads by: an ImageFolder with ``train/``, or a flat folder. Without, weights do."""
    dataset: str | None = None
    """A dataset as timm names it: ``hfds/NAME``, ``wds/NAME``, ``torch/NAME``, ``tfds/NAME``."""
    train_split: str = "train"
    """Split the images are taken from."""
    calibration_images: int | None = None
    """How many images; None is :data:`INSPECTED_IMAGES`."""
    seed: int = 42
    """Of the choice of images."""
    batch_size: int = 16
    """Images at a time."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:N``."""
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)

    def __post_init__(self) -> None:
        require_choice("--sort", self.sort, get_args(Sort))
        require("--batch-size", self.batch_size, self.batch_size >= 1, "at least 1")
        require("--calibration-images", self.images_wanted, self.images_wanted >= 1, "at least 1")
        if self.html is not None:
            _require_page("--html", self.html)
        if self.png is not None:
            name = os.fspath(self.png)
            require("--png", name, name.lower().endswith(".png"), "a name that ends in .png")
        if self.overwrite and self.html is None and self.png is None:
            raise UsageError("--overwrite: nothing is written without --html or --png FILE; leave it out")
        if self.shapes:
            _refuse_beside("--shapes", "reads no weights", self._needs_numbers())
            if self.sort in ("similarity", "rank"):
                raise UsageError(f"--sort {self.sort}: is not known from shapes alone; leave --shapes out")
        if self.calibration_images is not None and not self.sees_images:
            raise UsageError(
                f"--calibration-images {self.calibration_images}: no images are looked at; "
                "say where they are with --data-dir DIR or --dataset NAME"
            )

    @property
    def sees_images(self) -> bool:
        """Whether the model is run on images."""
        return self.data_dir is not None or self.dataset is not None or self.compare is not None

    @property
    def images_wanted(self) -> int:
        """``calibration_images``, or the default."""
        return INSPECTED_IMAGES if self.calibration_images is None else self.calibration_images

    def _needs_numbers(self) -> dict[str, bool]:
        """Flags that ask for more than shapes, and whether they were given."""
        return {
            "--compare": self.compare is not None,
            "--data-dir": self.data_dir is not None,
            "--dataset": self.dataset is not None,
        }


INSPECTED_IMAGES = 64
"""Images that ``mhacut inspect`` looks at, some thousand tokens."""


@dataclass(frozen=True)
class ExportOptions(CheckpointOptions):
    """Everything ``mhacut export`` can be told."""

    format: ExportFormat = "onnx"
    """``onnx`` for ONNX Runtime, ``pt2`` for ``torch.export.load``, ``timm`` for a folder of timm's."""
    output: PathLike | None = None
    """What to write; None is the checkpoint's stem and the format's ending in the working directory."""
    overwrite: bool = False
    """Replace an existing file; the input is never replaced."""
    dtype: ExportDtype = "float32"
    """What the file computes in; images and answers are float32 whatever it is."""
    fixed_batch: int | None = None
    """Images at a time; None is any number."""
    opset: int = 18
    """Of ONNX; 23 and later have an operator for attention."""

    def __post_init__(self) -> None:
        require_choice("--format", self.format, get_args(ExportFormat))
        require_choice("--dtype", self.dtype, get_args(ExportDtype))
        if self.output is not None:
            self._require_ending(os.fspath(self.output))
        require("--opset", self.opset, self.opset >= 18, "at least 18")
        if self.fixed_batch is not None:
            require("--fixed-batch", self.fixed_batch, self.fixed_batch >= 1, "at least 1")
            traced = self.format != "timm"
            require("--fixed-batch", self.fixed_batch, traced, "--format onnx or pt2; timm takes any number")
        known = self.format != "onnx" or self.dtype != "bfloat16"
        require("--dtype", self.dtype, known, "float32 or float16: ONNX Runtime has few kernels for others")

    def _require_ending(self, output: str) -> None:
        """What other tools tell a file by must not name another format."""
        formats = get_args(ExportFormat)
        told = next((name for name in formats if output.lower().endswith(f".{name}")), self.format)
        require("--output", output, told == self.format, f"another name, or --format {told}")


@dataclass(frozen=True)
class BenchOptions(Flat):
    """Everything ``mhacut bench`` can be told."""

    checkpoints: tuple[PathLike, ...]
    """What ``mhacut prune`` reads or writes; the first is what the others are compared with."""
    model: str | None = None
    """timm architecture of bare checkpoints."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for that architecture, ``{"img_size": 32}``."""
    runtime: Runtime = "eager"
    """``eager``, ``compile`` for torch.compile, ``onnx`` for ONNX Runtime."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Images at a time."""
    seconds: float = 5.0
    """Per batch size, for all checkpoints together."""
    threads: int | None = None
    """On CPUs; None is torch's own choice."""
    dtype: ExportDtype = "float32"
    """What is computed in."""
    fused: bool = True
    """Fused attention kernels where a layer can use them."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:N``."""

    def __post_init__(self) -> None:
        require("CHECKPOINT", len(self.checkpoints), len(self.checkpoints) >= 1, "at least one")
        require_choice("--runtime", self.runtime, get_args(Runtime))
        for batch_size in self.batch_sizes:
            require("--batch-sizes", batch_size, batch_size >= 1, "at least 1")
        require("--seconds", self.seconds, 0 < self.seconds < float("inf"), "above 0")
        if self.threads is not None:
            require("--threads", self.threads, self.threads >= 1, "at least 1")
        require_choice("--dtype", self.dtype, get_args(ExportDtype))


@dataclass(frozen=True)
class ModelsOptions(Flat):
    """Everything ``mhacut models`` can be told."""

    pattern: str = "*"
    """Of names, as for ``timm.list_models``."""
    refused: bool = False
    """Only those that cannot be cut."""


def unknown_option(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _require_page(flag: str, path: PathLike) -> None:
    name = os.fspath(path)
    require(flag, name, name.lower().endswith((".html", ".htm")), "a name that ends in .html")


def _refuse_beside(flag: str, why: str, given: Mapping[str, bool]) -> None:
    """Raise a :class:`UsageError` that names what cannot stand beside ``flag``."""
    others = [name for name, there in given.items() if there]
    if others:
        raise UsageError(f"{flag} {why}, which {' and '.join(others)} would need: leave one of them out")


def require(flag: str, value: object, holds: bool, expected: str) -> None:
    """Raise a :class:`UsageError` that names the flag unless ``holds``."""
    if not holds:
        raise UsageError(f"{flag} {value}: expected {expected}")


def require_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    require(flag, value, value in choices, "one of " + ", ".join(choices))
