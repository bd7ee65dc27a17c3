"""``mhacut evaluate`` as a function: read a checkpoint, measure its accuracy on labelled images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mhacut.checkpoint.load import read_as_told
from mhacut.checkpoint.preprocessing import resolve_preprocessing
from mhacut.data import Preprocessing, evaluation_loader
from mhacut.errors import MhacutError, UsageError
from mhacut.measuring.accuracy import Evaluation, evaluate
from mhacut.options.evaluate import EvaluateOptions
from mhacut.runtime.device import resolve_device, warn_of_slow_amp
from mhacut.runtime.progress import Reporter
from mhacut.surgery.flops import count_parameters, measure_flops
from mhacut.surgery.info import classifier_size


@dataclass(frozen=True)
class CheckpointAccuracy:
    """How good a checkpoint is, and what it was measured on."""

    source: str
    architecture: str
    evaluation: Evaluation
    flops: int
    parameters: int
    preprocessing: Preprocessing
    data: str
    """The images, for readers."""
    device: str


def evaluate_checkpoint(options: EvaluateOptions, reporter: Reporter) -> CheckpointAccuracy:
    """Accuracy of the checkpoint on the validation split of its data.

    Raises:
        MhacutError: and its kinds: the checkpoint or the images cannot be read, or do not fit together.
    """
    data = options.data
    if data.data_dir is None and data.dataset is None:
        raise UsageError("nothing to evaluate on: give --data-dir DIR or --dataset NAME")
    device = resolve_device(options.device)
    if options.amp:
        warn_of_slow_amp(device, reporter.log)
    reporter.start("reading")
    loaded = read_as_told(options, reporter)
    classes = classifier_size(loaded.model)
    if classes == 0:
        raise MhacutError(f"{loaded.source}: the model has no classifier, so it has no accuracy")
    preprocessing = resolve_preprocessing(loaded, options.preprocessing)
    flops = measure_flops(loaded.model, preprocessing.input_size)
    loader = evaluation_loader(
        preprocessing,
        data_dir=None if data.data_dir is None else Path(data.data_dir),
        dataset=data.dataset,
        batch_size=options.batch_size,
        workers=data.workers,
        split=data.val_split,
        num_classes=classes,
        class_map=None if data.class_map is None else Path(data.class_map),
    )
    reporter.start("evaluating")
    evaluation = evaluate(loaded.model, loader, device=device, amp=options.amp, progress=reporter.advance)
    return CheckpointAccuracy(
        source=loaded.source,
        architecture=loaded.identity.architecture,
        evaluation=evaluation,
        flops=flops,
        parameters=count_parameters(loaded.model),
        preprocessing=preprocessing,
        data=loader.description,
        device=str(device),
    )
