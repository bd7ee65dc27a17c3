"""``mhacut evaluate`` as a function: a checkpoint and labelled images in, its accuracy out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from mhacut.checkpoint.identity import ModelHints
from mhacut.checkpoint.load import open_from_options
from mhacut.checkpoint.module import copy_of_module
from mhacut.checkpoint.preprocessing import resolve_preprocessing
from mhacut.checkpoint.provenance import Provenance, provenance, with_hint
from mhacut.data import Preprocessing, evaluation_loader
from mhacut.errors import MhacutError, UsageError, option_name
from mhacut.measuring.accuracy import Evaluation
from mhacut.measuring.accuracy import evaluate as measure_accuracy
from mhacut.measuring.normalisation import SAMPLE
from mhacut.options.base import IN_MEMORY, PathLike
from mhacut.options.evaluate import EvaluateOptions
from mhacut.runtime.device import resolve_device, warn_of_slow_amp
from mhacut.runtime.progress import SILENT, Reporter
from mhacut.surgery.flops import count_parameters, measure_flops
from mhacut.surgery.info import classifier_size

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mhacut.options.keywords import EvaluateKeywords


@dataclass(frozen=True)
class EvaluateResult:
    """Accuracy of a checkpoint, and what it was measured on."""

    source: str
    architecture: str
    evaluation: Evaluation
    flops: int
    parameters: int
    preprocessing: Preprocessing
    provenance: Provenance
    """Origin of each value in ``preprocessing``."""
    data: str
    """Description of the images."""
    device: str


def evaluate(
    checkpoint: PathLike | nn.Module, *, reporter: Reporter | None = None, **options: Unpack[EvaluateKeywords]
) -> EvaluateResult:
    """Measure the accuracy of ``checkpoint`` on the validation split of labelled images.

    Args:
        checkpoint: ``.safetensors``, ``.pth``, a timm folder, a slim file, ``timm:NAME``, or a timm module,
            which is copied.
        reporter: receives progress and messages; silent by default.
        options: those of the command line; see :class:`mhacut.options.keywords.EvaluateKeywords`.

    Raises:
        MhacutError: one of its kinds, in :mod:`mhacut.errors`: the checkpoint or the images cannot be read,
            or do not fit together.
    """
    if not isinstance(checkpoint, nn.Module):
        return run_evaluate(EvaluateOptions.from_flat(checkpoint=checkpoint, **options), reporter or SILENT)
    given = EvaluateOptions.from_flat(checkpoint=IN_MEMORY, **options)
    return run_evaluate(given, reporter or SILENT, checkpoint)


def run_evaluate(
    options: EvaluateOptions, reporter: Reporter, module: nn.Module | None = None
) -> EvaluateResult:
    """Run ``mhacut evaluate``, on a copy of ``module`` where there is no checkpoint."""
    data = options.data
    if not data.has_images:
        raise UsageError(
            f"nothing to evaluate on: give {option_name('data_dir')} or {option_name('dataset')}"
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
    if classes == 0:
        raise MhacutError(f"{loaded.source}: the model has no classifier, so it has no accuracy")
    preprocessing = resolve_preprocessing(loaded, options.preprocessing)
    flops = measure_flops(loaded.model, preprocessing.input_size)
    loader = evaluation_loader(preprocessing, data, num_classes=classes, batch_size=options.batch_size)
    reporter.start("checking the preprocessing")
    sample = partial(
        evaluation_loader,
        preprocessing,
        data,
        num_classes=classes,
        batch_size=options.batch_size,
        limit=SAMPLE,
    )
    origins = provenance(loaded, options.preprocessing)
    origins = with_hint(origins, loaded.model, preprocessing, sample, device)
    reporter.start("evaluating")
    evaluation = measure_accuracy(
        loaded.model, loader, device=device, amp=options.amp, progress=reporter.advance
    )
    return EvaluateResult(
        source=loaded.source,
        architecture=loaded.identity.architecture,
        evaluation=evaluation,
        flops=flops,
        parameters=count_parameters(loaded.model),
        preprocessing=preprocessing,
        provenance=origins,
        data=loader.description,
        device=str(device),
    )
