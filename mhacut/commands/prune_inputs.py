"""First stage of ``mhacut prune``: read everything, and find what is wrong with it before the work."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.identity import ModelHints
from mhacut.checkpoint.load import open_from_options
from mhacut.checkpoint.module import rebuilt_module
from mhacut.checkpoint.preprocessing import (
    Provenance,
    license_for_history,
    provenance,
    resolve_preprocessing,
    source_for_history,
    with_hint,
)
from mhacut.checkpoint.record import SlimRecord
from mhacut.commands.prune_names import check_output_paths, options_of_each
from mhacut.data import (
    CalibrationImages,
    EvaluationLoader,
    ImagesInMemory,
    Preprocessing,
    WithoutLabels,
    calibration_images,
    evaluation_loader,
    has_split,
)
from mhacut.data.folders import split_folder
from mhacut.data.in_memory import Expected, check_one_source, split_in_memory
from mhacut.errors import UnsupportedModelError, UsageError, option_name
from mhacut.exporting.stopwatch import Stopwatch
from mhacut.measuring.accuracy import Evaluation, Fidelity, accuracy_for_history, agreement, evaluate
from mhacut.measuring.normalisation import SAMPLE
from mhacut.options.base import TimingOptions
from mhacut.options.prune import OTHER_TARGETS, PruneOptions, Scope
from mhacut.plan import Plan, TokenPlan, UnitKey, UnitKind
from mhacut.pruning.choose_merges import with_all_merged
from mhacut.pruning.curves import Curve
from mhacut.pruning.job import Job
from mhacut.pruning.limits import MULTIPLE, Constraints
from mhacut.pruning.preserve import ANSWERS, Preserved
from mhacut.report.history import curves_to_json
from mhacut.runtime.device import software_versions, warn_of_slow_amp
from mhacut.runtime.distributed import Processes
from mhacut.runtime.process import worker_count
from mhacut.runtime.progress import Reporter
from mhacut.surgery.costs import Dtypes, build_cost_table
from mhacut.surgery.features import Features, find_layers, find_pyramid, find_token_map
from mhacut.surgery.find import classifier_size, find_prunable_layers, gives_probabilities
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.hooks import captured_outputs
from mhacut.surgery.output_tokens import tokens_read_by_head
from mhacut.surgery.tokens import tokens_of, why_not_merged, with_tokens

_GPU_MULTIPLE, _LEAST_TILES = 16, 4
"""Multiple of all widths on a GPU, and the smallest dense width in such multiples."""
# Where files lie on the machine that made a slim file is nobody else's business.
_PATHS = ("checkpoint", "class_map", "data_dir", "output", "report")
_LOCAL = frozenset((*_PATHS, "as_", "dry_run", "overwrite", "workers"))
_NEWER = frozenset((*OTHER_TARGETS, "preserve", "runtime", "int8", "threads"))
"""Options that a slim file records only if the user set them."""
_VALIDATION, _SEARCHED = "validation images", "images of the set searched on"


@dataclass(frozen=True)
class Predictions:
    """Logits of a model for the validation images."""

    logits: Tensor
    """[n, classes], on the CPU."""
    evaluation: Evaluation | None = None
    """Accuracy; None without labels."""
    right: tuple[bool, ...] = ()
    """For each image: whether the top-1 class is the label."""


@dataclass(frozen=True)
class Validation:
    """Validation images and the dense model's logits for them."""

    batches: Iterable[tuple[Tensor, Tensor]] | None
    """Images and labels, in the same order in every pass. Label -1: no label. None: no images."""
    sample: str
    """Name of the images in texts for users."""
    no_accuracy: str
    """Reason for measuring no accuracy; empty if accuracy is measured."""
    model: nn.Module
    """The dense classifier."""
    processes: Processes
    reporter: Reporter

    @cached_property
    def dense(self) -> Predictions:
        """Predictions of the dense model, computed at the first access and in the first process only."""
        predictions = self.predictions_of(self.model) if self.processes.first else None
        return predictions or Predictions(torch.empty(0))

    def evaluate_dense(self) -> None:
        """Compute the predictions of the dense model now: targets must be checked before these minutes."""
        _ = self.dense

    def predictions_of(self, model: nn.Module) -> Predictions | None:
        """Return the predictions of ``model`` after moving it to the device; None without images."""
        if self.batches is None:
            return None
        self.reporter.start("evaluating")
        answers: list[tuple[Tensor, Tensor]] = []
        evaluation = evaluate(
            model, self.batches, device=self.processes.device, progress=self.reporter.advance, answers=answers
        )
        logits, labels = map(torch.cat, zip(*answers, strict=True))
        named = None if self.no_accuracy else replace(evaluation, sample=self.sample)
        return Predictions(logits, named, tuple((logits.argmax(1) == labels).tolist()))

    def fidelity(self, answers: Predictions) -> Fidelity:
        """Compare the predictions of a slim model with the dense model's."""
        likeness = agreement(self.dense.logits, answers.logits, classes=True)
        assert likeness.kl is not None
        return Fidelity(likeness.kl, likeness.same_answer, likeness.images, self.sample)


@dataclass(frozen=True)
class PruneInputs:
    """Everything that ``mhacut prune`` reads for 1 output file."""

    options: PruneOptions
    """Options of this file: 1 budget, 1 output path."""
    loaded: Checkpoint
    preprocessing: Preprocessing
    provenance: Provenance
    """Origin of each value in ``preprocessing``."""
    images: CalibrationImages
    validation: Validation
    job: Job
    stopwatch: Stopwatch

    @property
    def target(self) -> Path:
        """Path of the slim file."""
        return Path(str(self.options.output))

    @property
    def dtypes(self) -> Dtypes:
        """Dtype of each tensor in the slim file, equal to the dtype in the checkpoint."""
        read, dtypes = self.loaded.dtypes, {}
        for name, tensor in self.job.model.state_dict().items():
            # Tensors that are only there where tokens are left out are stored as the rest of their layer.
            neighbour = f"{name.rsplit('.', 2)[0]}.proj.weight"
            dtypes[name] = read.get(name, read.get(neighbour, tensor.dtype))
        return dtypes

    def record(
        self,
        plan: Plan,
        curves: Mapping[UnitKey, Curve],
        flops: int,
        budget: int | None = None,
        evaluation: Evaluation | None = None,
        fidelity: Fidelity | None = None,
        targets: Sequence[Mapping[str, Any]] = (),
    ) -> SlimRecord:
        """Return the record that the slim file stores about its origin."""
        options, loaded, preserved = self.options, self.loaded, self.job.preserved
        changed = options.changed()
        stated = {
            name: value
            for name, value in options.values().items()
            if name not in _LOCAL and (name not in _NEWER or name in changed)
        }
        entry: dict[str, Any] = {
            "command": "prune",
            "options": {**stated, "round_to": self.job.round_to},
            "seed": options.seed,
            **({} if budget is None else {"budget": budget}),
            "flops_before": self.job.table.dense,
            "flops_after": flops,
            **source_for_history(loaded),
            "data": self.images.description,
        }
        if preserved is not None and preserved.what != "answers":
            entry["preserved"] = preserved.to_json()
        if preserved is not None and preserved.metric != "answers":
            entry["divergence_of"] = preserved.metric
        entry |= self.provenance.to_history()
        entry |= accuracy_for_history(self.validation.dense.evaluation, evaluation)
        if fidelity is not None and math.isfinite(fidelity.divergence):  # JSON has no infinity
            entry["fidelity"] = asdict(fidelity)
        entry |= {} if loaded.record is not None else license_for_history(loaded)
        entry["versions"] = software_versions()
        if targets:
            entry["targets"] = list(targets)
        if curves:
            entry["curves"] = curves_to_json(curves, plan)
        earlier = loaded.record
        return SlimRecord(
            identity=loaded.identity,
            plan=plan if earlier is None else plan.after(earlier.plan),
            preprocessing=self.preprocessing.to_json(),
            history=(*(() if earlier is None else earlier.history), entry),
        )


def read_inputs(
    options: PruneOptions,
    processes: Processes,
    reporter: Reporter,
    module: nn.Module | None = None,
    given: ImagesInMemory | None = None,
    val_given: ImagesInMemory | None = None,
) -> tuple[PruneInputs, ...]:
    """Read the checkpoint and the images. Several budgets give inputs that differ in the options only."""
    check_one_source(given, options)
    check_output_paths(options)  # the command line did; Python did not
    reporter.start("reading")
    for note in options.unmet_needs().values():
        reporter.log(note)
    if options.amp:
        warn_of_slow_amp(processes.device, reporter.log)
    if options.max_latency is not None and processes.size > 1:  # they would disturb each other's times
        asked = option_name("max_latency", options.max_latency)
        raise UsageError(f"{asked}: expected one process, found {processes.size} of torchrun")
    if module is None:
        loaded = open_from_options(options, reporter)
    else:
        hints = ModelHints(options.model, options.model_args, options.num_classes, options.part)
        loaded = rebuilt_module(module, hints)
        for note in loaded.notes:
            reporter.log(note)
    check_output_paths(options, loaded.stem, loaded.path)  # default names may be known only now
    dense = loaded.model.requires_grad_(False)
    preprocessing = resolve_preprocessing(loaded, options)
    stopwatch = Stopwatch(
        options.only(TimingOptions), dense, preprocessing.input_size, processes.device, reporter
    )
    preserved = _preserved(options, dense, stopwatch.size, reporter)
    options = replace(options, scope=_scope(options, dense, preserved, reporter))
    job = _job(options, dense, stopwatch, preserved)
    dense.to(processes.device)
    reporter.start("loading images")
    classes = classifier_size(dense)
    compares = job.preserved is not None and job.preserved.metric == "answers"
    judged = partial(Validation, model=dense, processes=processes, reporter=reporter)
    images, validation = read_images(options, preprocessing, given, val_given, judged, compares=compares)
    reporter.log(f"searching on {images.description}")
    held = classes if images.labels is None else len(images.labels.unique())
    if 2 * held < min(classes, len(images.images)):
        reporter.log(
            f"calibration images cover {held} of {classes} classes; accuracy on the others may drop more"
        )
    if validation.no_accuracy and (given is not None or val_given is not None or options.has_images):
        reporter.log(f"accuracy is not measured: {validation.no_accuracy}")
    origins = provenance(loaded, options)
    if given is None and images.labels is not None and processes.first:  # others were normalised elsewhere
        reporter.start("checking the preprocessing")
        sample = (
            images.images[:SAMPLE].split(options.batch_size),
            images.labels[:SAMPLE].split(options.batch_size),
        )
        origins = with_hint(origins, dense, preprocessing, partial(zip, *sample), processes.device)
        if origins.hint is not None:
            reporter.log(origins.hint)
    job = replace(
        job,
        model=job.model.to(processes.device),
        images=images.images,
        labels=images.labels,
        extra_images=images.rest,
        workers=worker_count(options.workers) if given is None and images.rest is not None else 0,
    )
    shared = PruneInputs(options, loaded, preprocessing, origins, images, validation, job, stopwatch)
    return tuple(replace(shared, options=alone) for alone in options_of_each(options, loaded.stem))


# --- the images ---


def read_images(
    options: PruneOptions,
    preprocessing: Preprocessing,
    given: ImagesInMemory | None,
    val_given: ImagesInMemory | None,
    judged: partial[Validation],
    *,
    compares: bool,
) -> tuple[CalibrationImages, Validation]:
    """Return the calibration images and the validation images."""
    classes, batch_size, seed = classifier_size(judged.keywords["model"]), options.batch_size, options.seed
    use_labels, count = options.labels and classes > 1, options.eval_images if classes > 1 else 0
    no_accuracy = "" if use_labels or classes < 2 else option_name("labels", False)
    expected = Expected(preprocessing.input_size, classes if use_labels else None)
    batches: Iterable[tuple[Tensor, Tensor]] | None = None
    sample = _SEARCHED
    if given is None:
        images = calibration_images(
            preprocessing,
            options,
            count=options.images_wanted,
            seed=seed,
            num_classes=classes if classes > 1 else None,
            use_labels=use_labels,
        )
    else:
        wanted, left = options.images_wanted, count if val_given is None else 0
        images, batches = split_in_memory(
            given, expected, count=wanted, measured=left, seed=seed, batch_size=batch_size
        )
    if not count or (given is None and val_given is None and not options.has_images):
        nothing = "there are no images" if options.eval_images else option_name("eval_images", 0)
        return images, judged(None, sample, nothing if options.max_drop is not None else "")
    if val_given is not None:
        found, _ = split_in_memory(
            val_given, expected, count=count, measured=0, seed=0, batch_size=batch_size
        )
        labels = torch.full((len(found.images),), -1) if found.labels is None else found.labels
        batches = list(zip(found.images.split(batch_size), labels.split(batch_size), strict=True))
        sample = _SEARCHED if val_given is given else _VALIDATION
        no_accuracy = no_accuracy or ("no labels" if found.labels is None else "")
    elif given is not None:
        few = "no labels" if images.labels is None else "too few images"
        no_accuracy = no_accuracy or ("" if batches is not None else few)
    else:
        batches, sample, no_accuracy = _validation_split(options, preprocessing, classes, no_accuracy)
    return images, judged(None if no_accuracy and not compares else batches, sample, no_accuracy)


def _validation_split(
    options: PruneOptions, preprocessing: Preprocessing, classes: int, no_labels: str
) -> tuple[EvaluationLoader | None, str, str]:
    """Return the images of the validation split, their name, and the reason for missing labels."""
    split = options.val_split
    if not has_split(options, split):
        where = f"{options.data_dir} ({option_name('val_split')})"
        return None, "", no_labels or f"no labelled split {split!r} in {where}"
    same = split == options.train_split
    if options.dataset is None and options.data_dir is not None:  # folders have aliases
        root = Path(options.data_dir)
        same = split_folder(root, split) == split_folder(root, options.train_split)
    elif no_labels:
        return None, "", no_labels  # whether it has such a split is known only once it is opened
    opened = partial(
        evaluation_loader,
        preprocessing,
        options,
        num_classes=classes,
        batch_size=options.batch_size,
        limit=options.eval_images,
    )
    try:
        loader = opened(use_labels=not no_labels)
    except WithoutLabels as error:
        loader, no_labels = opened(use_labels=False), str(error)
    return loader, _SEARCHED if same else _VALIDATION, no_labels


# --- the job ---


def _scope(options: PruneOptions, dense: nn.Module, preserved: Preserved, reporter: Reporter) -> Scope:
    """Resolve ``--scope auto``: merge tokens in every model that allows merging."""
    if options.scope != "auto":
        return options.scope
    if options.allocation != "curves":
        reason = option_name("allocation", options.allocation)
    elif not options.bounds_work:
        reason = "token merging does not reduce parameters or file size"
    elif preserved.metric == "features" or (options.keep_dead_tokens and not preserved.dense):
        reason = "merged tokens have no separate features"
    else:
        reason = why_not_merged(dense, preserved.dense) or _not_copied(preserved)
    if reason:
        reporter.log(f"scope: channels only: {reason}")
        return "attention+mlp"
    alone = option_name("scope", "attention+mlp")
    features = "merged tokens are copied back to their patches" if preserved.dense else "no patch features"
    reporter.log(
        f"scope: channels and token merging ({features}). {alone} cuts channels only. ONNX, OpenVINO and pt2 "
        "exports run anywhere; eager PyTorch needs mhacut"
    )
    return "attention+mlp+tokens"


def _not_copied(preserved: Preserved) -> str:
    """Return why ``preserved`` outputs cannot be copied back from merged tokens, or an empty text."""
    inside = [name for name in preserved.features.layers if not re.fullmatch(r"blocks\.\d+|norm", name)]
    return f"tokens in {inside[0]!r} are not copied back, those after blocks are" if inside else ""


def _job(options: PruneOptions, dense: nn.Module, stopwatch: Stopwatch, preserved: Preserved) -> Job:
    """Return the pruning job without images."""
    size, reporter = stopwatch.size, stopwatch.reporter
    all_tokens, merges = preserved.dense or options.keep_dead_tokens, options.scope.endswith("+tokens")
    tokens = tokens_of(dense) if all_tokens else _without_unread_tokens(dense, reporter)
    unmerge = preserved.dense if merges else tokens.unmerge
    if merges and (reason := why_not_merged(dense, unmerge) or _not_copied(preserved)):
        raise UnsupportedModelError(
            f"{option_name('scope', options.scope)}: tokens cannot be merged: {reason}"
        )
    # Channels are cut in a model that merges nothing; its merges, old or new, come back at the end.
    model = with_tokens(dense, replace(tokens, merged=()))
    merged, prunable = () if merges else tokens.merged, find_prunable_layers(model)
    if preserved.dense:
        # The pooling head of SigLIP does not run for the features of all tokens, nor does the class attention
        # of CaiT for the levels of its pyramid; nothing says what cuts of them would cost.
        names = [layer.name for layer in prunable.layers]
        with torch.no_grad(), captured_outputs(model, names, lambda args, output: None) as called:
            preserved.features.of(model, torch.zeros(1, *size))
        if unused := [name for name in names if name not in called]:
            prunable = prunable.without(unused, f"does not run for {preserved}")

    unmerged = with_tokens(model, replace(tokens, merged=merged, unmerge=unmerge))
    table, fewest = build_cost_table(unmerged, prunable, size), None
    if unmerged is not dense:
        table = replace(table, dense=measure_flops(dense, size))
    if merges:
        most_merged = build_cost_table(with_all_merged(model, size, unmerge), prunable, size)
        fewest = replace(most_merged, dense=table.dense)
    kinds: tuple[UnitKind, ...] = ("qk", "v") if options.scope == "attention" else ("qk", "v", "hidden")
    units = prunable.units(kinds)
    # Kernels of GPUs work on tiles of 16; narrow layers would be left with few widths to choose from.
    on_gpu = options.max_latency is not None and stopwatch.device.type != "cpu"
    wide = all(unit.width >= _LEAST_TILES * _GPU_MULTIPLE for unit in units)
    return Job(
        model=model,
        prunable=prunable,
        units=units,
        table=table,
        images=torch.empty(0, *size),
        options=options,
        round_to=options.round_to or (_GPU_MULTIPLE if on_gpu and wide else MULTIPLE),
        amp=options.amp,
        reporter=reporter,
        all_merged_costs=fewest,
        preserved=preserved,
        merged=merged,
        unmerge=unmerge,
        constraints=Constraints(options.exclude, options.min_width, options.equal_qkv),
    )


def _preserved(
    options: PruneOptions, dense: nn.Module, size: tuple[int, int, int], reporter: Reporter
) -> Preserved:
    """Return the outputs to preserve: ``--preserve``, or logits, or without a classifier all tokens."""
    asked, classes, image = options.preserve, classifier_size(dense), torch.zeros(1, *size)
    if asked == "pooled":
        return Preserved("pooled", "features", Features("pooled" if classes else "output"))
    if (asked == "answers" or asked is None) and classes:
        return ANSWERS if gives_probabilities(dense) else Preserved.outputs_of(dense)
    if asked == "answers":
        raise UnsupportedModelError(
            f"{option_name('preserve', asked)}: the model has no classifier, so there are no answers to "
            "preserve; expected tokens, pooled, pyramid or names of layers"
        )
    what = asked or "tokens"
    try:
        applied = tokens_of(dense)
        if (applied.merged and not applied.unmerge) or applied.output_tokens is not None:
            raise UnsupportedModelError(
                "the checkpoint leaves out tokens, so it has no features of each; prune the dense one, or "
                f"one that was pruned with {option_name('keep_dead_tokens', True)}"
            )
        if what == "tokens":
            features = find_token_map(dense, find_prunable_layers(dense), image)
        elif what == "pyramid":
            features = find_pyramid(dense, image)
        else:
            names = [name.strip() for name in what.split(",")]
            features = find_layers(dense, names, find_prunable_layers(dense), image)
        kind: Any = what if what in ("tokens", "pyramid") else "layers"
        preserved = Preserved(kind, "dense", features)
    except UnsupportedModelError as error:
        if asked is not None:
            raise UnsupportedModelError(f"{option_name('preserve', asked)}: {error}") from error
        preserved = Preserved.outputs_of(dense)
        reporter.log(f"the model has no classifier: preserving {preserved}: {error}")
        return preserved
    why = "" if asked else "the model has no classifier: "
    pooled = option_name("preserve", "pooled")
    reporter.log(
        f"{why}preserving {preserved}{'' if asked else f'; {pooled} preserves pooled features instead'}"
    )
    return preserved


def _without_unread_tokens(dense: nn.Module, reporter: Reporter) -> TokenPlan:
    """Return the token plan of a classifier: the last block computes only the tokens that the head reads."""
    applied = tokens_of(dense)
    if applied.output_tokens is not None or not classifier_size(dense):
        return applied
    try:
        read = tokens_read_by_head(dense)
    except UnsupportedModelError as reason:
        reporter.log(f"all tokens of the last block are computed: {reason}")
        return applied
    shown = "token" if read == 1 else f"{read} tokens"
    asked = option_name("keep_dead_tokens", True)
    reporter.log(f"last block: computes only the {shown} that the classifier reads; {asked} computes all")
    return replace(applied, output_tokens=read)
