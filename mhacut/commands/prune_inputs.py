"""First stage of ``mhacut prune``: read the checkpoint and the images, and build the pruning job."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.huggingface import is_huggingface
from mhacut.checkpoint.identity import ModelHints
from mhacut.checkpoint.load import load_model, open_from_options
from mhacut.checkpoint.module import rebuilt_module
from mhacut.checkpoint.preprocessing import (
    Provenance,
    provenance,
    resolve_preprocessing,
    source_for_history,
    stated_license,
    with_hint,
)
from mhacut.checkpoint.record import SlimRecord
from mhacut.checkpoint.write import file_size, write_slim
from mhacut.commands.prune_attempt import Attempt, TargetResult
from mhacut.commands.prune_names import check_output_paths, options_of_each
from mhacut.commands.prune_validation import Validation, read_images
from mhacut.data import CalibrationImages, ImagesInMemory, Preprocessing
from mhacut.data.in_memory import check_one_source
from mhacut.errors import UnsupportedModelError, UsageError, option_name
from mhacut.exporting.stopwatch import Stopwatch
from mhacut.measuring.accuracy import Evaluation, Fidelity, accuracy_for_history
from mhacut.measuring.normalisation import SAMPLE
from mhacut.options.base import PathLike, TimingOptions
from mhacut.options.prune import OTHER_TARGETS, PruneOptions
from mhacut.plan import Plan, TokenPlan, UnitKey
from mhacut.pruning.build_job import build_job, resolve_scope
from mhacut.pruning.curves import Curve
from mhacut.pruning.job import Job
from mhacut.pruning.limits import MULTIPLE, Constraints
from mhacut.pruning.planner import Planned
from mhacut.pruning.preserve import Preserved, find_preserved
from mhacut.report.history import curves_to_json
from mhacut.runtime.device import software_versions, warn_of_slow_amp
from mhacut.runtime.distributed import Processes
from mhacut.runtime.process import worker_count
from mhacut.runtime.progress import Reporter
from mhacut.surgery.costs import Dtypes, count_bytes
from mhacut.surgery.find import classifier_size
from mhacut.surgery.output_tokens import tokens_read_by_head
from mhacut.surgery.tokens import tokens_of

_GPU_MULTIPLE, _LEAST_TILES = 16, 4
"""For latency budgets on GPUs: widths are rounded to multiples of 16 if every dense width is at least 4 times
16."""
# Where files lie on the machine that made a slim file is nobody else's business.
_PATHS = ("checkpoint", "class_map", "data_dir", "output", "report")
_LOCAL = frozenset((*_PATHS, "as_", "dry_run", "overwrite", "workers"))
_NEWER = frozenset((*OTHER_TARGETS, "preserve", "runtime", "int8", "threads"))
"""Names of options that a slim file records only if the user changed their default values."""


class Output(ABC):
    """File or folder of 1 slim model."""

    @abstractmethod
    def size(self, model: nn.Module) -> int: ...

    @abstractmethod
    def write(
        self,
        path: PathLike,
        model: nn.Module,
        *,
        overwrite: bool,
        check: Callable[[Path], None] | None = None,
    ) -> None:
        """Write ``model``.

        Before the file appears at ``path``, ``check`` is called with a temporary path of the file.
        """

    @abstractmethod
    def open(self, path: PathLike) -> nn.Module: ...

    def complete(self, path: Path, rows: Sequence[Sequence[str]]) -> None:
        """Add a table of results (``rows``) to the model card of a written folder."""
        return


class Source(ABC):
    """Dense model as read from its file or folder, and the type of output for slim models."""

    loaded: Checkpoint
    name: str
    """Name of the model's architecture in output texts."""
    model: nn.Module
    """Dense model from images [B, C, H, W] to logits or features, float32, in eval mode."""
    preprocessing: Preprocessing
    provenance: Provenance
    """Origin of each value in ``preprocessing``: an option, the checkpoint or a default."""
    images: CalibrationImages
    stopwatch: Stopwatch
    """Latency measurement of slim models in turns with the dense model."""

    @abstractmethod
    def size(self) -> int:
        """Return the bytes of the dense model's tensors in their file."""

    @abstractmethod
    def slim(self, attempt: Attempt, job: Job) -> tuple[nn.Module, Planned]:
        """Return the complete slim model, and the plan with layer names of the complete model."""

    @abstractmethod
    def output(self, record: SlimRecord, dtypes: Dtypes) -> Output: ...

    def preserved(self, preserved: Preserved) -> dict[str, Any]:
        return preserved.to_json()

    def classifier(self, model: nn.Module) -> nn.Module:
        """Return ``model`` as a module that takes images only."""
        return model

    def dtypes(self, model: nn.Module) -> Dtypes:
        """Return the dtype in the file by tensor name. Tensors without an entry keep their dtype."""
        return {}


@dataclass(frozen=True)
class PruneInputs:
    options: PruneOptions
    """Options of 1 output file, with 1 budget of each kind at most."""
    source: Source
    validation: Validation
    job: Job

    @property
    def checkpoint(self) -> CheckpointSource:
        assert isinstance(self.source, CheckpointSource)  # the option is refused for folders
        return self.source

    @property
    def dtypes(self) -> Dtypes:
        return self.source.dtypes(self.job.model)

    def record(
        self,
        plan: Plan,
        curves: Mapping[UnitKey, Curve],
        flops: int,
        budget: int | None = None,
        evaluation: Evaluation | None = None,
        fidelity: Fidelity | None = None,
        reached: Sequence[TargetResult] = (),
    ) -> SlimRecord:
        """Return the description of the pruning that the slim file stores."""
        options, source, preserved = self.options, self.source, self.job.preserved
        changed, loaded = options.changed(), source.loaded
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
            "data": source.images.description,
        }
        if preserved is not None and preserved.what != "answers":
            entry["preserved"] = preserved.to_json()
        if preserved is not None and preserved.metric != "answers":
            entry["divergence_of"] = preserved.metric
        entry |= source.provenance.to_history()
        entry |= accuracy_for_history(self.validation.dense_predictions().evaluation, evaluation)
        if fidelity is not None and math.isfinite(fidelity.divergence):  # JSON has no infinity
            entry["fidelity"] = asdict(fidelity)
        if loaded.record is None and (license_name := stated_license(loaded)) is not None:
            entry["license"] = license_name
        entry["versions"] = software_versions()
        if len(reached) > 1 or (reached and options.flops is None):  # the budget of FLOPs is above
            entry["targets"] = [target.to_json() for target in reached]
        if curves:
            entry["curves"] = curves_to_json(curves, plan)
        earlier = loaded.record
        return SlimRecord(
            identity=loaded.identity,
            plan=plan if earlier is None else plan.after(earlier.plan),
            preprocessing=source.preprocessing.to_json(),
            history=(*(() if earlier is None else earlier.history), entry),
        )


# --- a timm checkpoint ---


class SlimFile(Output):
    def __init__(self, record: SlimRecord, dtypes: Dtypes, input_path: Path | None) -> None:
        self.record, self.dtypes, self.input_path = record, dtypes, input_path

    def size(self, model: nn.Module) -> int:
        return file_size(model, self.record, self.dtypes)

    def write(
        self,
        path: PathLike,
        model: nn.Module,
        *,
        overwrite: bool,
        check: Callable[[Path], None] | None = None,
    ) -> None:
        write_slim(
            path,
            model,
            self.record,
            dtypes=self.dtypes,
            overwrite=overwrite,
            input_path=self.input_path,
            check=check,
        )

    def open(self, path: PathLike) -> nn.Module:
        return load_model(path)


class CheckpointSource(Source):
    def __init__(self, loaded: Checkpoint, preprocessing: Preprocessing, stopwatch: Stopwatch) -> None:
        self.loaded, self.preprocessing, self.stopwatch = loaded, preprocessing, stopwatch
        self.model, self.name = loaded.model, loaded.identity.architecture

    def size(self) -> int:
        return count_bytes(self.model, self.loaded.dtypes)

    def dtypes(self, model: nn.Module) -> Dtypes:
        read, dtypes = self.loaded.dtypes, {}
        for name, tensor in model.state_dict().items():
            # Tensors that are only there where tokens are left out are stored as the rest of their layer.
            neighbour = f"{name.rsplit('.', 2)[0]}.proj.weight"
            dtypes[name] = read.get(name, read.get(neighbour, tensor.dtype))
        return dtypes

    def slim(self, attempt: Attempt, job: Job) -> tuple[nn.Module, Planned]:
        return attempt.model, attempt.planned

    def output(self, record: SlimRecord, dtypes: Dtypes) -> SlimFile:
        return SlimFile(record, dtypes, self.loaded.path)


def read_inputs(
    options: PruneOptions,
    processes: Processes,
    reporter: Reporter,
    module: nn.Module | None,
    images: ImagesInMemory | None,
    val_images: ImagesInMemory | None,
) -> tuple[PruneInputs, ...]:
    """Read the checkpoint and the images once. Return the inputs of each output file, by budget."""
    check_one_source(images, options)
    check_output_paths(options)  # the command line did; Python did not
    reporter.start("reading")
    for note in options.unmet_needs().values():
        reporter.log(note)
    if options.amp:
        warn_of_slow_amp(processes.device, reporter.log)
    if options.max_latency is not None and processes.size > 1:  # they would disturb each other's times
        latency = option_name("max_latency", options.max_latency)
        raise UsageError(f"{latency}: expected 1 process, found {processes.size}. Run without torchrun")
    source = _read_checkpoint(options, processes, reporter, module)
    check_output_paths(options, source.loaded.stem, source.loaded.path)  # default names may be known only now
    dense, size = source.model, source.preprocessing.input_size
    preserved = find_preserved(dense, options.preserve, size, reporter)
    channels_only = ""  # the reason
    if not options.bounds_work:
        channels_only = "token merging does not reduce parameters or file size"
    elif options.keep_dead_tokens and not preserved.dense:
        channels_only = "merged tokens have no separate features"
    scope = resolve_scope(options.scope, options, dense, preserved, size, reporter, channels_only)
    all_tokens = preserved.dense or options.keep_dead_tokens
    tokens = tokens_of(dense) if all_tokens else _without_unread_tokens(dense, reporter)
    job = build_job(dense, torch.empty(0, *size), preserved, scope, options, tokens)
    job = replace(job, merges_must_pay=options.scope == "auto")
    dense.to(processes.device)
    reporter.start("loading images")
    validation = partial(Validation, model=dense, processes=processes, reporter=reporter)
    compares = preserved.metric == "answers"
    source.images, judged = read_images(
        options, source.preprocessing, images, val_images, validation, compares=compares
    )
    _log_images(source.images, classifier_size(dense), reporter)
    if judged.no_accuracy and (images is not None or val_images is not None or options.has_images):
        reporter.log(f"accuracy is not measured: {judged.no_accuracy}")
    source.provenance = provenance(source.loaded, options)
    if images is None and processes.first:  # images in memory are normalised already
        _check_preprocessing(source, options.batch_size, processes.device, reporter)
    round_to = options.round_to or MULTIPLE
    # Kernels of GPUs work on tiles of 16. Narrow layers would be left with few widths to choose from.
    tiled = all(unit.width >= _LEAST_TILES * _GPU_MULTIPLE for unit in job.units)
    if options.round_to is None and options.max_latency and source.stopwatch.device.type != "cpu" and tiled:
        round_to = _GPU_MULTIPLE
    job = replace(
        job,
        model=job.model.to(processes.device),
        images=source.images.images,
        labels=source.images.labels,
        extra_images=source.images.rest,
        workers=worker_count(options.workers) if images is None and source.images.rest is not None else 0,
        round_to=round_to,
        amp=options.amp,
        reporter=reporter,
        constraints=Constraints(options.exclude, options.min_width, options.equal_qkv),
    )
    files = options_of_each(options, source.loaded.stem)
    return tuple(PruneInputs(alone, source, judged, job) for alone in files)


def _read_checkpoint(
    options: PruneOptions, processes: Processes, reporter: Reporter, module: nn.Module | None
) -> CheckpointSource:
    if module is None:
        loaded = open_from_options(options, reporter)
        if is_huggingface(loaded):
            if loaded.record:
                raise UsageError(f"{loaded.source}: was pruned already. Start from the dense model")
            option = option_name("as_", "huggingface")
            raise UsageError(
                f"{loaded.source}: this transformers model cannot be converted to timm. Use {option}"
            )
    else:
        hints = ModelHints(options.model, options.model_args, options.num_classes, options.part)
        loaded = rebuilt_module(module, hints)
        for note in loaded.notes:
            reporter.log(note)
    dense = loaded.model.requires_grad_(False)
    preprocessing = resolve_preprocessing(loaded, options)
    timing, size = options.only(TimingOptions), preprocessing.input_size
    stopwatch = Stopwatch(timing, dense, size, processes.device, reporter)
    return CheckpointSource(loaded, preprocessing, stopwatch)


def _log_images(images: CalibrationImages, classes: int, reporter: Reporter) -> None:
    reporter.log(f"calibrating on {images.description}")
    held = classes if images.labels is None else len(images.labels.unique())
    if 2 * held < min(classes, len(images.images)):
        reporter.log(
            f"calibration images cover {held} of {classes} classes; "
            "accuracy on the other classes may drop more"
        )


def _check_preprocessing(
    source: CheckpointSource, batch_size: int, device: torch.device, reporter: Reporter
) -> None:
    images = source.images
    if images.labels is None:
        return
    reporter.start("checking the preprocessing")
    sample = images.images[:SAMPLE].split(batch_size), images.labels[:SAMPLE].split(batch_size)
    batches = partial(zip, *sample)
    source.provenance = with_hint(source.provenance, source.model, source.preprocessing, batches, device)
    if source.provenance.hint is not None:
        reporter.log(source.provenance.hint)


def _without_unread_tokens(dense: nn.Module, reporter: Reporter) -> TokenPlan:
    """Let the last block of a classifier compute only the tokens that the head reads."""
    applied = tokens_of(dense)
    if applied.output_tokens is not None or not classifier_size(dense):
        return applied
    try:
        read = tokens_read_by_head(dense)
    except UnsupportedModelError as reason:
        reporter.log(f"all tokens of the last block are computed: {reason}")
        return applied
    tokens, keep = "token" if read == 1 else f"{read} tokens", option_name("keep_dead_tokens", True)
    reporter.log(
        f"last block: computes only the {tokens} that the classifier reads; {keep} computes all tokens"
    )
    return replace(applied, output_tokens=read)
