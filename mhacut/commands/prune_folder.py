"""``mhacut prune FOLDER --as huggingface``: a model of transformers is pruned as what it is."""

from __future__ import annotations

import copy
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mhacut.budget import Budget
from mhacut.checkpoint.folder import PREPROCESSORS, preprocessor_of
from mhacut.checkpoint.foreign.config import Config, image_side, transformers_cfg
from mhacut.checkpoint.part_file import CARD, FILES, load_dense, load_pruned, save_pruned, write_pruned
from mhacut.checkpoint.preprocessing import Provenance
from mhacut.commands.prune_attempt import CHECK_IMAGES, TIMING_SECONDS
from mhacut.commands.prune_in_place import prune_
from mhacut.commands.prune_inputs import Predictions, Validation, read_images
from mhacut.commands.prune_names import options_of_each
from mhacut.commands.prune_result import PruneResult
from mhacut.data import ImagesInMemory, Preprocessing
from mhacut.errors import CheckpointError, MhacutError, UnsupportedModelError, UsageError, option_name
from mhacut.exporting.stopwatch import Stopwatch
from mhacut.measuring.accuracy import ModelFigures
from mhacut.options.base import TimingOptions
from mhacut.options.prune import PruneOptions, SearchOptions
from mhacut.pruning.check import same_outputs
from mhacut.runtime.distributed import gathered
from mhacut.runtime.files import check_outputs, show, stem_of
from mhacut.runtime.process import world_size
from mhacut.runtime.progress import Reporter, StageTimer
from mhacut.surgery.costs import count_bytes
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.flops import count_parameters


class ImageClassifier(nn.Module):
    """A transformers model as a function from images [B, C, H, W] to logits, or to features."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, size: tuple[int, ...]) -> None:
        """Wrap the model. ``size`` is the [C, H, W] of a test image."""
        super().__init__()
        self.model = model
        try:
            logits = model(pixel_values=torch.zeros(1, *size)).get("logits")
        except Exception as error:  # the model's own
            raise UnsupportedModelError(
                f"{type(model).__name__} fails on pixel_values of shape {list(size)}: {error!s:.200}. "
                "Use mhacut.prune_ in Python, which prunes any model"
            ) from None
        self.num_classes = logits.shape[1] if logits is not None and logits.ndim == 2 else 0

    def forward(self, images: Tensor) -> Tensor:
        output: Any = self.model(pixel_values=images)
        first: Tensor = output.get("logits", tree_leaves(output)[0])
        return first


def prune_folder(
    options: PruneOptions,
    reporter: Reporter,
    images: ImagesInMemory | None = None,
    val_images: ImagesInMemory | None = None,
) -> PruneResult:
    """Prune the model in a transformers folder with :func:`mhacut.prune_` and write a folder.

    FLOPs count the vision transformer, parameters and latency count the complete model.
    """
    asked = option_name("as_", "huggingface")
    if not options.checkpoint:
        raise UsageError(f"{asked}: expected a folder of transformers, found a module; see mhacut.prune_")
    if world_size() > 1:
        raise UsageError(f"{asked}: expected one process, found {world_size()} of torchrun")
    timer, folder = StageTimer(reporter), Path(options.checkpoint)
    timer.start("reading")
    target = Path(str(options_of_each(options, stem_of(folder))[0].output))
    made = () if options.dry_run else [target / each for each in (*FILES, *PREPROCESSORS)]
    check_outputs(made, overwrite=options.overwrite, input_paths=(folder,))
    model, dtype = load_dense(folder)
    preprocessing, name = _preprocessing(folder, model), type(model).__name__
    size = preprocessing.input_size
    with gathered(options.device) as processes:
        whole = ImageClassifier(model, size).to(processes.device)
        answers = options.preserve == "answers" or (options.preserve is None and whole.num_classes > 1)
        if answers and whole.num_classes < 2:
            raise UsageError(f"{option_name('preserve', 'answers')}: {name} is no classifier")
        timer.start("loading images")
        judged = partial(Validation, model=whole, processes=processes, reporter=timer)
        found, validation = read_images(options, preprocessing, images, val_images, judged, compares=answers)
        timer.log(f"searching on {found.description}")
        dense_answers, dense = validation.dense, copy.deepcopy(whole)
        batches = [{"pixel_values": batch} for batch in found.images.split(options.batch_size)]
        search: Any = options.only(SearchOptions).values() | {"scope": options.scope}
        cut = prune_(
            model, "" if answers else None, images=batches, flops=str(options.flops), reporter=timer, **search
        )
        model.to(dtype).float()  # what the file holds
        slim_answers, fidelity = validation.predictions_of(whole), cut.fidelity
        if slim_answers is not None and cut.metric == "answers":
            fidelity = validation.fidelity(slim_answers)
        stopwatch = Stopwatch(options.only(TimingOptions), dense, size, processes.device, timer)
        times: Any = (None, None)
        if options.latency:
            timer.start("timing")
            times = stopwatch.compare([whole], seconds=TIMING_SECONDS).wall

    def figures(
        whole: ImageClassifier, flops: int, ms: float | None, answers: Predictions | None
    ) -> ModelFigures:
        stored = count_bytes(whole, dict.fromkeys(whole.state_dict(), dtype))
        return ModelFigures(flops, count_parameters(whole), ms, getattr(answers, "evaluation", None), stored)

    result = PruneResult(
        output=None if options.dry_run else target,
        architecture=f"{name}, FLOPs of {cut.part}" if cut.part else name,
        plan=cut.plan,
        budget=Budget.parse(str(options.flops)).amount(cut.flops_before),
        dense=figures(dense, cut.flops_before, times[0], dense_answers),
        slim=figures(whole, cut.flops_after, times[1], slim_answers),
        data=found.description,
        preprocessing=preprocessing,
        provenance=Provenance(dict.fromkeys(preprocessing.to_json(), "file"), name),
        not_prunable=find_prunable_layers(dense.model.get_submodule(cut.part)).not_prunable,
        device=str(processes.device),
        latency_batch_size=options.latency_batch_size,
        timing=stopwatch.conditions() if options.latency else {},
        fidelity=fidelity,
        preserved={"what": "answers" if answers else "tokens", "outputs": list(cut.preserved)},
        metric=cut.metric,
        _model=model.cpu(),
        _write=lambda file, slim, overwrite: save_pruned(slim.to(dtype), file, overwrite=overwrite),
    )

    def finish(written: Path) -> None:
        shutil.copyfile(folder / "config.json", written / "config.json")
        first, *rows = ("| " + " | ".join(cells) + " |" for cells in result.rows())
        with (written / CARD).open("a", encoding="utf-8") as card:
            card.write("\n".join(["", first, "|---|---|---|---|", *rows, ""]))
        opened = ImageClassifier(load_pruned(written).float(), size)
        if not same_outputs(opened, whole.float(), found.images[:CHECK_IMAGES]):
            raise MhacutError(
                f"{show(target)}: outputs of the folder differ from those of the model in memory; nothing "
                f"was written. This is a bug in mhacut. Please report the class {name}"
            )

    if not options.dry_run:
        timer.start("writing")
        write_pruned(model.to(dtype), target, overwrite=options.overwrite, finish=finish)
    result.seconds = timer.taken()
    return result


def _preprocessing(folder: Path, model: Any) -> Preprocessing:
    """Return the preprocessing of the model folder. The image size is the folder's, or else the model's."""
    stated = preprocessor_of(folder)
    if stated is None:
        raise CheckpointError(
            f"{show(folder)}: expected preprocessor_config.json, which states how images become inputs; "
            "write it: transformers.AutoImageProcessor.from_pretrained(NAME).save_pretrained(FOLDER)"
        )
    config = Config(model.config.to_dict(), show(folder / "config.json"))
    channels, processor = config.get("num_channels", 3), Config(stated, show(folder / PREPROCESSORS[0]))
    side = image_side(processor) or config.get("image_size", 224)
    return Preprocessing.resolve(transformers_cfg(processor, channels), (channels, side, side))
