"""The ``finetune`` command as a function."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from mhacut.checkpoint.load import load_model
from mhacut.finetuning.folder import BEST, LAST, check_folder_before_reading, completed
from mhacut.finetuning.result import FinetuneResult
from mhacut.finetuning.run import Run, read_run
from mhacut.finetuning.saving import start
from mhacut.finetuning.steps import check_logs, train
from mhacut.finetuning.training import check_precision
from mhacut.options.base import PathLike
from mhacut.options.finetune import FinetuneOptions
from mhacut.options.option import takes_keywords
from mhacut.runtime.device import default_torch
from mhacut.runtime.distributed import gathered
from mhacut.runtime.progress import Reporter, Reporting, Silent, reporting


@dataclass(frozen=True)
class FinetuneCall(Reporting, FinetuneOptions):
    checkpoint: PathLike | None = None  # type: ignore[assignment]  # resume needs none


@default_torch()
@takes_keywords(FinetuneCall)
def finetune(
    checkpoint: PathLike | None = None,
    *,
    progress: bool | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> FinetuneResult:
    """Fine-tune a slim file with a teacher, labels or both, and write a slim file with the best weights.

        result = mhacut.finetune("vit-2.0G.safetensors", teacher="vit.safetensors", data_dir="images/")
        model = mhacut.load_model(result.output)

    Under torchrun, every process makes the same call, and the processes share the work.

    Args:
        checkpoint: slim file to fine-tune. Leave out to continue a run with ``resume``.
        progress: show a progress bar. Default: in notebooks and terminals.
        reporter: receives progress and messages instead of a bar.
        options: options of the command line, listed below by ``help()``.

    Raises:
        MhacutError: a subclass in :mod:`mhacut.errors`.
    """
    values = options if checkpoint is None else {"checkpoint": checkpoint, **options}
    with reporting(reporter, progress) as active:
        return run_finetune(FinetuneOptions.of(**completed(values)), active)


def run_finetune(options: FinetuneOptions, reporter: Reporter) -> FinetuneResult:
    check_logs(options.logs)
    with gathered(options.device) as processes:
        check_precision(options, processes.device)
        with processes.fail_together():
            if processes.first:
                check_folder_before_reading(options)  # the command line did; Python did not
            run = read_run(options, processes, reporter if processes.first else Silent())
            if processes.first and options.resume is None:  # else it was said when the run began
                for note in run.options.unmet_needs().values():
                    reporter.log(note)
        try:
            return _finetune(run)
        finally:
            run.trainer.disconnect()


def _finetune(run: Run) -> FinetuneResult:
    began = time.perf_counter()
    start(run)
    run.trainer.connect()
    if run.progress.step < run.total_steps:
        run.reporter.log(f"training on {run.images.description}")
    images_per_second = train(run)
    output = run.weights(BEST if run.progress.best is not None else LAST)
    after, losses = None, None
    if run.validation is None and run.progress.start is not None and run.progress.best is not None:
        losses = -run.progress.start, -run.progress.best
    if run.validation is not None:
        run.reporter.start("evaluating")
        # The file, not the model in memory: it may be an earlier epoch's, and in half precision.
        with run.processes.fail_together():
            written = load_model(output)
        after = run.measure(written)
    return FinetuneResult(
        folder=run.folder.path,
        output=output,
        architecture=run.loaded.identity.architecture,
        before=run.progress.before,
        after=after,
        losses=losses,
        epochs=tuple(run.progress.rows),
        improved=run.progress.improved,
        steps=run.progress.step,
        flops=run.flops,
        data=run.images.description,
        preprocessing=run.preprocessing,
        provenance=run.provenance,
        unreadable=tuple(run.progress.unreadable),
        images_per_second=images_per_second,
        device=str(run.processes.device),
        processes=run.processes.size,
        seconds=time.perf_counter() - began,
    )
