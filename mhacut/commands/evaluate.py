"""``mhacut evaluate`` as a function: accuracy of a checkpoint on labelled images."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

from torch import nn

from mhacut.budget import format_flops
from mhacut.checkpoint.identity import ModelHints
from mhacut.checkpoint.load import open_from_options
from mhacut.checkpoint.module import copy_of_module
from mhacut.checkpoint.preprocessing import Provenance, provenance, resolve_preprocessing, with_hint
from mhacut.data import EvaluationLoader, ImagesInMemory, Preprocessing, evaluation_loader
from mhacut.data.in_memory import Expected, InMemoryBatches, check_one_source
from mhacut.errors import MhacutError, UsageError, option_name
from mhacut.measuring.accuracy import Evaluation
from mhacut.measuring.accuracy import evaluate as measure_accuracy
from mhacut.measuring.normalisation import SAMPLE
from mhacut.options.base import IN_MEMORY, PathLike
from mhacut.options.measure import EvaluateOptions
from mhacut.options.option import takes_keywords
from mhacut.report.choices import html_table
from mhacut.runtime.device import default_torch, resolve_device, warn_of_slow_amp
from mhacut.runtime.progress import Reporter, Reporting, reporting
from mhacut.surgery.find import classifier_size
from mhacut.surgery.flops import count_parameters, measure_flops
from mhacut.text import safe_table


@dataclass(frozen=True)
class EvaluateResult:
    source: str
    architecture: str
    evaluation: Evaluation
    flops: int
    parameters: int
    preprocessing: Preprocessing
    provenance: Provenance
    """Origin of each value in ``preprocessing``: an option, the checkpoint or a default."""
    data: str
    """Description of the evaluated images for users."""
    device: str

    def rows(self) -> list[tuple[str, str]]:
        """Return the results as rows of (name, value)."""
        top5 = self.evaluation.top5
        return [
            ("top-1", f"{self.evaluation.top1:.2f}%{self.evaluation.doubt}"),
            *([] if top5 is None else [("top-5", f"{top5:.2f}%")]),
            ("images", str(self.evaluation.images)),
            ("FLOPs", format_flops(self.flops)),
            ("parameters", format_flops(self.parameters)),
        ]

    def __repr__(self) -> str:
        return safe_table(*self._shown())

    def _repr_html_(self) -> str:
        return html_table(*self._shown())

    def _shown(self) -> tuple[list[tuple[str, str]], list[str]]:
        return [(self.architecture, ""), *self.rows()], [f"from {self.source}, on {self.data}"]


@dataclass(frozen=True)
class _EvaluateCall(Reporting, EvaluateOptions):
    checkpoint: PathLike | nn.Module  # type: ignore[assignment]  # wider than the command's
    _: KW_ONLY
    images: ImagesInMemory | None = None


@default_torch()
@takes_keywords(_EvaluateCall)
def evaluate(
    checkpoint: PathLike | nn.Module,
    *,
    images: ImagesInMemory | None = None,
    progress: bool | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> EvaluateResult:
    """Measure the accuracy of ``checkpoint`` on a validation split, or on labelled images in memory.

    Args:
        checkpoint: ``.safetensors``, ``.pth``, a timm folder, a slim file, ``timm:NAME``, or a timm module
            (copied).
        images: images instead of ``data_dir``, normalised as the model expects: a tuple of images, float
            [N, C, H, W], and labels, int [N], or a ``DataLoader`` or iterable of such tuples.
        progress: show a progress bar. Default: in notebooks and terminals.
        reporter: receives progress and messages instead of a bar.
        options: options of the command line, listed below by ``help()``.

    Raises:
        MhacutError: a subclass in :mod:`mhacut.errors`: the checkpoint or the images cannot be read, or the
            labels do not fit the model.
    """
    module = checkpoint if isinstance(checkpoint, nn.Module) else None
    path = IN_MEMORY if isinstance(checkpoint, nn.Module) else checkpoint
    parsed = EvaluateOptions.of(checkpoint=path, **options)
    with reporting(reporter, progress) as active:
        return run_evaluate(parsed, active, module, images)


def run_evaluate(
    options: EvaluateOptions,
    reporter: Reporter,
    module: nn.Module | None = None,
    images: ImagesInMemory | None = None,
) -> EvaluateResult:
    check_one_source(images, options)
    if images is None and not options.has_images:
        raise UsageError(
            f"no images to evaluate on: give {option_name('data_dir')} or {option_name('dataset')}"
        )
    device = resolve_device(options.device)
    if options.amp:
        warn_of_slow_amp(device, reporter.log)
    reporter.start("reading")
    if module is None:
        loaded = open_from_options(options, reporter)
    else:
        loaded = copy_of_module(
            module, ModelHints(options.model, options.model_args, options.num_classes, options.part)
        )
    classes = classifier_size(loaded.model)
    if classes < 2:
        what = "one output" if classes else "no classifier"
        raise MhacutError(f"{loaded.source}: the model has {what}, but accuracy needs at least 2 classes")
    preprocessing = resolve_preprocessing(loaded, options)
    flops = measure_flops(loaded.model, preprocessing.input_size)
    origins = provenance(loaded, options)
    loader: EvaluationLoader | InMemoryBatches
    if images is None:
        opened = partial(
            evaluation_loader, preprocessing, options, num_classes=classes, batch_size=options.batch_size
        )
        loader = opened()
        reporter.start("checking the preprocessing")
        sample = partial(opened, limit=SAMPLE)
        origins = with_hint(origins, loaded.model, preprocessing, sample, device, refuse=False)
    else:
        # The caller has normalised the images, so the preprocessing is not checked.
        loader = InMemoryBatches(images, Expected(preprocessing.input_size, classes), options.batch_size)
    reporter.start("evaluating")
    evaluation = measure_accuracy(
        loaded.model, loader, device=device, amp=options.amp, progress=reporter.advance
    )
    in_memory = f"{evaluation.images} images in memory"
    return EvaluateResult(
        source=loaded.source,
        architecture=loaded.identity.architecture,
        evaluation=evaluation,
        flops=flops,
        parameters=count_parameters(loaded.model),
        preprocessing=preprocessing,
        provenance=origins,
        data=loader.description if isinstance(loader, EvaluationLoader) else in_memory,
        device=str(device),
    )
