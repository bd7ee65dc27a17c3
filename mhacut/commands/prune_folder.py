"""``mhacut prune FOLDER --as huggingface``: a model of transformers keeps its class."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.folder import PREPROCESSORS
from mhacut.checkpoint.huggingface import ImageModel, open_huggingface, write_huggingface
from mhacut.checkpoint.part_file import CARD, FILES, load_pruned
from mhacut.checkpoint.preprocessing import Provenance, resolve_preprocessing
from mhacut.checkpoint.record import SlimRecord
from mhacut.commands.prune_attempt import Attempt
from mhacut.commands.prune_in_place import cut_submodule, find_part
from mhacut.commands.prune_inputs import Output, PruneInputs, Source
from mhacut.commands.prune_names import options_of_each
from mhacut.commands.prune_validation import Validation, read_images
from mhacut.data import ImagesInMemory
from mhacut.errors import UsageError, option_name
from mhacut.exporting.stopwatch import Stopwatch
from mhacut.options.base import PathLike, PreprocessingOptions, TimingOptions
from mhacut.options.prune import PruneOptions
from mhacut.pruning.build_job import submodule_job
from mhacut.pruning.job import Job
from mhacut.pruning.planner import Planned
from mhacut.pruning.preserve import Preserved
from mhacut.runtime.distributed import Processes
from mhacut.runtime.files import check_outputs, stem_of
from mhacut.runtime.progress import Reporter
from mhacut.surgery.costs import Dtypes, count_bytes
from mhacut.surgery.submodule import record_submodule


class Folder(Output):
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.history: tuple[dict[str, Any], ...] = ()

    def size(self, model: nn.Module) -> int:
        return count_bytes(model, dict.fromkeys(model.state_dict(), self.dtype))

    def write(
        self,
        path: PathLike,
        model: nn.Module,
        *,
        overwrite: bool,
        check: Callable[[Path], None] | None = None,
    ) -> None:
        write_huggingface(path, model, self.history, dtype=self.dtype, overwrite=overwrite, finish=check)

    def open(self, path: PathLike) -> nn.Module:
        return load_pruned(path).float()

    def complete(self, path: Path, rows: Sequence[Sequence[str]]) -> None:
        first, *others = ("| " + " | ".join(cells) + " |" for cells in rows)
        with (path / CARD).open("a", encoding="utf-8") as card:
            card.write("\n".join(["", first, "|---|---|---|---|", *others, ""]))


class FolderSource(Source):
    def __init__(
        self, loaded: Checkpoint, model: nn.Module, part: str, folder: Folder, stopwatch: Stopwatch
    ) -> None:
        self.loaded, self.transformers_model, self.part = loaded, model, part
        self.folder, self.stopwatch = folder, stopwatch
        self.model = stopwatch.dense
        self.outputs: tuple[str, ...] = ()
        """Names of the outputs that are preserved."""
        self.name = type(model).__name__ + (f", FLOPs of {part}" if part else "")

    def size(self) -> int:
        return self.folder.size(self.model)

    def slim(self, attempt: Attempt, job: Job) -> tuple[nn.Module, Planned]:
        model = self.transformers_model
        planned = cut_submodule(model.get_submodule(self.part), self.part, attempt, job)
        model.to(self.folder.dtype).float()  # the values in the file
        return model, planned

    def preserved(self, preserved: Preserved) -> dict[str, Any]:
        what = "answers" if preserved.metric == "answers" else "tokens"
        return {"what": what, "outputs": list(self.outputs)}

    def classifier(self, model: nn.Module) -> nn.Module:
        return ImageModel(model, self.stopwatch.size)

    def output(self, record: SlimRecord, dtypes: Dtypes) -> Folder:
        self.folder.history = record.history
        return self.folder


def read_folder(
    options: PruneOptions,
    processes: Processes,
    reporter: Reporter,
    images: ImagesInMemory | None,
    val_images: ImagesInMemory | None,
) -> PruneInputs:
    """Read a transformers folder and its images.

    FLOPs are those of the vision transformer. Parameters and latency are those of the complete model.
    """
    if not options.checkpoint:
        kind = option_name("as_", options.as_)
        raise UsageError(
            f"{kind}: expected a Hugging Face folder, found a module. Call mhacut.prune_ for modules"
        )
    reporter.start("reading")
    folder = Path(options.checkpoint)
    (options,) = options_of_each(options, stem_of(folder))
    written = (
        () if options.dry_run else [Path(str(options.output), name) for name in (*FILES, *PREPROCESSORS)]
    )
    check_outputs(written, overwrite=options.overwrite, input_paths=(folder,))
    loaded = open_huggingface(folder)
    if loaded.record is not None:
        raise UsageError(f"{loaded.source}: was pruned already. Start from the folder of the dense model")
    dense, name, dtype = loaded.model, loaded.identity.architecture, next(iter(loaded.dtypes.values()))
    assert isinstance(dense, ImageModel)
    model = copy.deepcopy(dense.model).to(processes.device)
    preprocessing = resolve_preprocessing(loaded, PreprocessingOptions())
    size = preprocessing.input_size
    dense.to(processes.device)
    answers = options.preserve == "answers" or (options.preserve is None and dense.num_classes > 1)
    if answers and dense.num_classes < 2:
        logits, tokens = option_name("preserve", "answers"), option_name("preserve", "tokens")
        raise UsageError(f"{logits}: {name} is no classifier. Use {tokens}")
    part = find_part(model, "" if answers else None)
    timing = options.only(TimingOptions)
    stopwatch = Stopwatch(timing, dense, size, processes.device, reporter)
    source = FolderSource(loaded, model, part, Folder(dtype), stopwatch)
    source.preprocessing = preprocessing
    source.provenance = Provenance(dict.fromkeys(preprocessing.to_json(), "file"), name)
    reporter.start("loading images")
    validation = partial(Validation, model=dense, processes=processes, reporter=reporter)
    source.images, judged = read_images(
        options, preprocessing, images, val_images, validation, compares=answers
    )
    reporter.log(f"calibrating on {source.images.description}")
    batches = [{"pixel_values": batch} for batch in source.images.images.split(options.batch_size)]
    recorded, submodule = record_submodule(model, part, batches, options.work.calibration_images)
    job, source.outputs = submodule_job(submodule, part, recorded, options, options.scope, reporter)
    return PruneInputs(options, source, judged, job)
