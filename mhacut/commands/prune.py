"""``mhacut prune`` as a function: read, calibrate, plan, cut, check, recover, write, measure, report."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.load import load_model
from mhacut.checkpoint.provenance import license_for_history
from mhacut.checkpoint.record import SlimRecord
from mhacut.checkpoint.write import write_slim
from mhacut.commands.prune_inputs import PruneInputs, read_inputs
from mhacut.commands.prune_result import PruneResult
from mhacut.data import ImagesInMemory
from mhacut.errors import DataError, MhacutError
from mhacut.measuring.accuracy import accuracy_for_history, evaluate
from mhacut.measuring.figures import ModelFigures
from mhacut.measuring.latency import compare_latency
from mhacut.options.base import IN_MEMORY, PathLike
from mhacut.options.prune import PruneOptions
from mhacut.pruning.calibrate import Calibration
from mhacut.pruning.check import check_exact, check_flops, same_outputs
from mhacut.pruning.choose_merges import divergence_by_merging
from mhacut.pruning.planner import Planned, Planner
from mhacut.pruning.preserve import Preserved
from mhacut.pruning.recover import recover
from mhacut.report.prune_page import measured_figures, write_report
from mhacut.report.stored_curves import curves_to_json
from mhacut.runtime.distributed import Processes, gathered
from mhacut.runtime.progress import SILENT, Reporter, StageTimer
from mhacut.runtime.progress_bar import reporting
from mhacut.runtime.versions import software_versions
from mhacut.surgery.find import PrunableLayers, find_prunable_layers
from mhacut.surgery.flops import count_parameters
from mhacut.surgery.slice import cut

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mhacut.options.keywords import PruneKeywords


MUCH = 0.2
"""Divergence in nats that is much: a tenth of the answers of an ImageNet ViT-Ti change."""


def prune(
    checkpoint: PathLike | nn.Module,
    *,
    flops: str | float,
    images: ImagesInMemory | None = None,
    progress: bool | None = None,
    reporter: Reporter | None = None,
    **options: Unpack[PruneKeywords],
) -> PruneResult:
    """Cut ``checkpoint`` down to ``flops`` and write a slim safetensors file.

        result = mhacut.prune(model, flops="50%", images=(images, labels))
        slim = result.model()

    Args:
        checkpoint: ``.safetensors``, ``.pth``, a timm folder, a slim file, ``timm:NAME``, or a dense timm
            module, which is copied. ``model_args`` then are the arguments that it was built with, except for
            ``num_classes`` and ``img_size``.
        flops: ``2.0G``, ``600M``, ``2e9`` or ``50%``; one FLOP is one multiply-accumulate.
        images: in place of ``data_dir``, images in memory, normalised as the model's are: float
            [N, C, H, W]; a tuple of these and labels, int [N]; or a ``DataLoader``, or any iterable, of such
            batches, which is read until there are enough images (shuffle it). With labels, accuracy is
            measured on images that were not calibrated on.
        progress: whether to show a bar; by default in notebooks and on terminals.
        reporter: receives progress and messages, in place of a bar.
        options: those of the command line; see :class:`mhacut.options.keywords.PruneKeywords`.

    Under torchrun every process calls this alike and calibrates on its share of the images; the first then
    searches and writes, and all return the same result.

    Raises:
        MhacutError: and its kinds, in :mod:`mhacut.errors`; nothing was written.
    """
    module = checkpoint if isinstance(checkpoint, nn.Module) else None
    path = IN_MEMORY if isinstance(checkpoint, nn.Module) else checkpoint
    given = PruneOptions.from_flat(checkpoint=path, flops=str(flops), **options)
    with reporting(reporter, progress) as shown:
        return run_prune(given, shown, module, images)


def run_prune(
    options: PruneOptions,
    reporter: Reporter,
    module: nn.Module | None = None,
    images: ImagesInMemory | None = None,
) -> PruneResult:
    """Run the nine stages of ``mhacut prune``, on a copy of ``module`` where there is no checkpoint."""
    with gathered(options.device) as processes:
        timer = StageTimer(reporter if processes.first else SILENT)
        with processes.together():
            inputs = read_inputs(options, processes, timer, module, images)  # 1. read
        job = inputs.job
        if images is not None:
            _check_same_images(job.images, processes)
        calibration = job.calibrate(processes)  # 2. calibrate
        made: list[nn.Module] = []

        def in_first_process() -> PruneResult:
            planned = Planner(job, calibration).plan()  # 3. plan
            timer.start("cutting")
            ready = planned.ready
            slim = copy.deepcopy(ready.model.cpu())
            cut(slim, ready.plan, ready.channel_scales, job.prunable)  # 4. cut
            slim_layers = find_prunable_layers(slim)
            flops = check_flops(slim, job, planned)  # 5. check
            check_exact(slim, job, ready, job.images[:_PROBED])
            slim = recover(slim, slim_layers, job, calibration, planned.merged)  # 6. recover
            if not options.dry_run:
                timer.start("writing")
                slim = _write(inputs, slim, _record(inputs, planned, flops))  # 7. write
            timer.stop()
            seconds = timer.seconds
            measured = _measure(inputs, calibration, slim, flops, timer)  # 8. measure
            if not options.dry_run and measured.slim.evaluation is not None:
                timer.start("writing")
                _write_again(inputs, slim, _record(inputs, planned, flops, measured))
            timer.stop()
            seconds["measuring"] = sum(timer.seconds.values()) - sum(seconds.values())
            page = None
            if options.report is not None:
                timer.start("reporting")
                page = _report(inputs, planned, slim, slim_layers, measured)  # 9. report
                timer.stop()
                seconds["reporting"] = timer.seconds["reporting"]
            made.append(slim.cpu())
            return _result(inputs, planned, measured, (seconds, timer.seconds), page)

        result = processes.from_first(in_first_process)
        # The model stays where it is: other processes find it in the file.
        return replace(result, _model=made[0]) if made else result


def _check_same_images(images: Tensor, processes: Processes) -> None:
    """Raise a :class:`DataError` unless all processes were given the same images in memory."""
    if processes.size > 1:
        digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
        if len(processes.union([digest])) > 1:
            raise DataError(
                "images: not the same in all processes, which share them; give the same, in the same order"
            )


_PROBED = 4
"""Number of images on which the cut and the written model are checked."""


@torch.no_grad()
def _write(inputs: PruneInputs, slim: nn.Module, record: SlimRecord) -> nn.Module:
    """Write the slim file; return the model in it, read as a user will read it and checked."""
    loaded, target, dtypes = inputs.loaded, inputs.target, inputs.dtypes
    write_slim(
        target,
        slim,
        record,
        dtypes=dtypes,
        overwrite=inputs.options.overwrite,
        input_path=loaded.path,
    )
    for name, parameter in slim.named_parameters():
        parameter.copy_(parameter.to(dtypes[name]))
    reloaded = load_model(target)
    # The tensors were compared bit for bit when they were written.
    if not same_outputs(reloaded, slim, inputs.images.images[:_PROBED]):
        raise MhacutError(
            f"{target}: was written but gives other logits than the model in memory; do not use it"
        )
    return reloaded


def _write_again(inputs: PruneInputs, slim: nn.Module, record: SlimRecord) -> None:
    """Write the file once more, with the accuracy in it: it was there before that could be interrupted."""
    write_slim(
        inputs.target,
        copy.deepcopy(slim).cpu(),
        record,
        dtypes=inputs.dtypes,
        overwrite=True,
        input_path=inputs.loaded.path,
    )


@dataclass(frozen=True)
class _Measured:
    dense: ModelFigures
    slim: ModelFigures
    divergence: float
    preserved: Preserved
    judged_on: int
    with_tokens: float | None


def _measure(
    inputs: PruneInputs, calibration: Calibration, slim: nn.Module, flops: int, reporter: Reporter
) -> _Measured:
    """Measure the slim model beside the dense one."""
    job, options = inputs.job, inputs.options
    dense = inputs.loaded.model
    models = (dense, slim.to(job.device))
    evaluation = None
    if inputs.validation is not None:
        reporter.start("evaluating")
        evaluation = evaluate(slim, inputs.validation, device=job.device, progress=reporter.advance)
    reporter.start("comparing")
    judge = job.distillation(calibration).part(0, max(calibration.held, 1))
    divergence = judge.divergence_of(slim)
    with_tokens = None
    if divergence > MUCH and judge.preserved.measure == "answers" and not job.merges_tokens:
        with_tokens = divergence_by_merging(job, calibration)
    times: tuple[float | None, ...] = (None, None)
    if options.latency:
        reporter.start("timing")
        size, batch = inputs.preprocessing.input_size, options.latency_batch_size
        times = tuple(compare_latency(models, size, batch_size=batch, device=job.device))
    return _Measured(
        ModelFigures(job.table.dense, count_parameters(dense), times[0], inputs.evaluation),
        ModelFigures(flops, count_parameters(slim), times[1], evaluation),
        divergence,
        judge.preserved,
        len(judge.images),
        with_tokens if with_tokens is not None and with_tokens < divergence / 2 else None,
    )


def _report(
    inputs: PruneInputs, planned: Planned, slim: nn.Module, layers: PrunableLayers, measured: _Measured
) -> Path:
    """Write the page about the run."""
    options, dense, target = inputs.options, inputs.loaded, inputs.target
    pruned = Checkpoint.of_model(
        slim,
        dense.identity,
        source=f"{target} (dry run)" if options.dry_run else str(target),
        record=_record(inputs, planned, measured.slim.flops),
        dtypes=inputs.dtypes,
    )
    figures = measured_figures(measured.dense, measured.slim, options.latency_batch_size, inputs.job.device)
    both = (inputs.job.prunable, layers)
    return write_report(options, dense, pruned, both, inputs.images, planned.log, figures, inputs.provenance)


def _result(
    inputs: PruneInputs,
    planned: Planned,
    measured: _Measured,
    seconds: tuple[Mapping[str, float], Mapping[str, float]],
    page: Path | None,
) -> PruneResult:
    return PruneResult(
        output=None if inputs.options.dry_run else inputs.target,
        architecture=inputs.loaded.identity.architecture,
        plan=planned.plan,
        budget=inputs.job.budget,
        dense=measured.dense,
        slim=measured.slim,
        data=inputs.images.description,
        preprocessing=inputs.preprocessing,
        provenance=inputs.provenance,
        not_prunable=inputs.job.prunable.not_prunable,
        repairs=planned.ready.repairs,
        device=str(inputs.job.device),
        latency_batch_size=inputs.options.latency_batch_size,
        seconds=seconds[0],
        stage_seconds=seconds[1],
        log=planned.log,
        curves=planned.curves,
        report=page,
        divergence=measured.divergence,
        preserved=measured.preserved.to_json(),
        divergence_of=measured.preserved.measure,
        judged_on=measured.judged_on,
        divergence_with_tokens=measured.with_tokens,
    )


def _record(
    inputs: PruneInputs, planned: Planned, flops: int, measured: _Measured | None = None
) -> SlimRecord:
    """Return what the slim file states about itself."""
    options, loaded, plan = inputs.options, inputs.loaded, planned.plan
    entry: dict[str, Any] = {
        "command": "prune",
        "options": {key: value for key, value in options.flat().items() if key not in _LOCAL_OPTIONS},
        "seed": options.search.seed,
        "budget": inputs.job.budget,
        "flops_before": inputs.job.table.dense,
        "flops_after": flops,
        "source_sha256": loaded.sha256,
        "data": inputs.images.description,
        **_preserved_for_history(inputs.job.preserved),
        **inputs.provenance.to_history(),
        **({} if measured is None else accuracy_for_history(inputs.evaluation, measured.slim.evaluation)),
        **({} if loaded.record is not None else license_for_history(loaded)),
        "versions": software_versions(),
    }
    if planned.curves:
        entry["curves"] = curves_to_json(planned.curves, plan)
    earlier = loaded.record
    return SlimRecord(
        identity=loaded.identity,
        plan=plan if earlier is None else plan.after(earlier.plan),
        preprocessing=inputs.preprocessing.to_json(),
        history=(*(() if earlier is None else earlier.history), entry),
    )


def _preserved_for_history(preserved: Preserved | None) -> dict[str, Any]:
    """Return what was preserved, where it was not the answers, as always before."""
    if preserved is None or preserved.what == "answers":
        return {}
    return {"preserved": preserved.to_json()}


# Where files lie on the machine that made a slim file is nobody else's business.
_LOCAL_OPTIONS = frozenset(
    {"checkpoint", "output", "report", "overwrite", "dry_run", "data_dir", "class_map", "workers"}
)
