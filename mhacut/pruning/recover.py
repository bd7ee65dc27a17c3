"""Recovery: training after the cut, accepted only if it lowers the divergence on held-out images."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mhacut.adapters.base import Layer
from mhacut.pruning.calibrate import Calibration
from mhacut.pruning.distill import Distillation, minimise
from mhacut.pruning.fisher import SHRINKAGE, FisherInformation
from mhacut.pruning.job import Job
from mhacut.pruning.merge_law import Schedule
from mhacut.pruning.paper.indicators import with_trained_scales
from mhacut.pruning.resumable import ResumableModel
from mhacut.pruning.tune import augmented, tuned
from mhacut.runtime.device import ordered_attention
from mhacut.runtime.progress import Reporter
from mhacut.surgery.features import channel_dims
from mhacut.surgery.find import PrunableLayers
from mhacut.surgery.hooks import captured_outputs
from mhacut.surgery.merging_blocks import unmerged
from mhacut.surgery.token_merging import Match
from mhacut.surgery.tokens import merged_of, set_merged, stack_of, unmerge_of

LR = 7e-4
"""Learning rate of healing at the first step of each block (docs/explanation/choices.md)."""
BATCH = 8
"""Maximum number of images per training step. Many small steps learn more in the same time than few large
steps."""
MAX_BYTES = 5 * 2**29
"""Maximum memory for images and activations of both models during training."""
TUNE_MIN_KL = 0.01
"""Skip tuning below this divergence, in nats, on crops of held-out images: tuning would gain nothing."""
HEAL_MIN_KL = 1e-3
"""Skip healing below this divergence, in nats, on held-out images: healing would gain nothing."""
MIN_CROPS = 256
"""Minimum number of crops of held-out images on which a training step is judged
(docs/explanation/choices.md)."""
MIN_BLOCK_ERROR = 1e-6
"""Skip the training of a block whose output has a smaller relative error."""


def recover(
    slim: nn.Module, prunable: PrunableLayers, job: Job, calibration: Calibration, merged: Schedule = ()
) -> nn.Module:
    """Return ``slim`` after the recovery steps that lower its divergence on held-out images."""
    options, reporter = job.options, job.reporter
    scale_steps, heal_steps, tune_steps = (
        options.trained_gain_steps,
        options.healed_steps,
        options.tuned_steps,
    )
    if calibration.held == 0 and (scale_steps or heal_steps or tune_steps):
        reporter.log("recovery skipped: with 1 calibration image, none is held out to check the result")
        scale_steps = heal_steps = tune_steps = 0
    slim = slim.to(job.device)
    unseen = cache(partial(_unseen, job, calibration))
    if scale_steps:
        reporter.start("reweighting")
        learning, lr = job.training(calibration), options.gain_lr
        scaled = with_trained_scales(slim, prunable, learning, steps=scale_steps, lr=lr, reporter=reporter)
        slim = _better(slim, scaled, unseen(), reporter, "training channel scales")
    if merged:
        set_merged(slim, merged, job.unmerge)
    if not (heal_steps or tune_steps):
        return slim.cpu()
    answers = calibration.preserved.metric == "answers"
    lost = job.held_out(calibration).divergence_of(slim) if answers else math.inf
    # Healing gains little where merged tokens are copied back, tuning more (docs/explanation/choices.md).
    unmerges = calibration.preserved.dense and unmerge_of(slim)
    heals = lost > HEAL_MIN_KL and not (unmerges and tune_steps)
    before_healing = slim
    if heal_steps and (options.heal_steps is not None or heals):
        reporter.start("healing")
        slim = _better(slim, healed(slim, prunable, job, calibration), unseen(), reporter, "healing")
    tunes = (answers or unmerges) and lost > HEAL_MIN_KL
    if tune_steps and (options.tuning_steps is not None or tunes):
        distance = unseen().divergence_of(slim)
        if options.tuning_steps is not None or distance > TUNE_MIN_KL:
            reporter.start("tuning")
            start = slim
            slim = _better(
                slim, tuned(slim, job, calibration, distance), unseen(), reporter, "tuning", distance
            )
            if slim is start and start is not before_healing:
                # Healed weights can be a dead end for tuning, where the weights before are not.
                lost = unseen().divergence_of(before_healing)
                changed = tuned(before_healing, job, calibration, lost)
                slim = _better(slim, changed, unseen(), reporter, "tuning without healing", distance)
    return slim.cpu()


@torch.no_grad()
def _unseen(job: Job, calibration: Calibration) -> Distillation:
    """Return images to judge recovery steps: held-out images, as random crops for classifiers."""
    unseen, size = job.held_out(calibration), job.options.batch_size
    if calibration.preserved.metric != "answers" or job.images.ndim != 4:
        return unseen
    # The dense model was often trained on these images, and the repair chose its ridges on them. Crops are
    # less familiar to both.
    crops = unseen.images.repeat(math.ceil(MIN_CROPS / len(unseen.images)), 1, 1, 1)
    generator, teacher = torch.Generator().manual_seed(job.options.seed), []
    for batch in crops.split(size):  # all at once would take the memory several times
        batch.copy_(augmented(batch, generator))
        teacher.append(calibration.preserved.outputs(job.model, batch.to(job.device)).float().cpu())
    return Distillation(crops, torch.cat(teacher), None, job.options, preserved=calibration.preserved)


def _better(
    slim: nn.Module,
    changed: nn.Module,
    unseen: Distillation,
    reporter: Reporter,
    name: str,
    before: float | None = None,
) -> nn.Module:
    before = unseen.divergence_of(slim) if before is None else before
    after = unseen.divergence_of(changed)
    helps = after < before  # not where training diverged, to no number
    reporter.log(
        f"{name} {'accepted' if helps else 'rejected'}: divergence on held-out images "
        f"{before:.2g} before, {after:.2g} after"
    )
    return changed if helps else slim


@dataclass(frozen=True)
class Block:
    """Module that is trained as a unit."""

    name: str
    layer: Layer
    """Last prunable layer in the block. Its tokens are the tokens of the block's output."""
    channel_dim: int = -1
    """Index of the channel axis in the block's output, set after the block ran."""


def healed(
    slim: nn.Module,
    prunable: PrunableLayers,
    job: Job,
    calibration: Calibration,
    *,
    lr: float = LR,
    batch: int = BATCH,
    most_bytes: int = MAX_BYTES,
) -> nn.Module:
    """Return a copy of ``slim`` with each block trained to reproduce the block of the dense model.

    The input of a block is the output of the healed blocks before. A block keeps its weights if training does
    not help on held-out images. If the slim model merges tokens, the dense model merges the same tokens.
    Weights shared with other modules are not trained. STARFISH (arXiv 2606.01126) trains all blocks at
    once.
    """
    model: Any = copy.deepcopy(slim)
    teacher = job.model
    merged = () if unmerge_of(slim) else merged_of(slim)
    if merged != merged_of(teacher):
        teacher = copy.deepcopy(teacher)
        set_merged(teacher, merged)
    image = job.images[:1].to(job.device)
    blocks, bytes_per_image = _comparable(model, teacher, blocks_of(prunable), image)
    images, held = _fewer(job.images, calibration.held, max(2, most_bytes // max(bytes_per_image, 1)))
    images, size = images.to(job.device), min(job.options.batch_size, batch)
    batches = [*images[:held].split(size), *images[held:].split(size)]
    unseen = len(images[:held].split(size))
    stack = stack_of(model) if merged else None
    prefix = 0 if stack is None else stack.prefix
    generator = torch.Generator().manual_seed(job.options.seed)
    with ResumableModel(model, batches) as cut, ResumableModel(teacher, batches) as dense:
        for number, block in enumerate(blocks, 1):
            calls = _calls_of(block, cut, dense)
            error = _Error.of(calls[unseen:], block, calibration.fisher, number == len(blocks), prefix)
            with cut.paused():
                _train(model, block.name, calls[:unseen], calls[unseen:], error, job, generator, lr)
            _answer(cut, block, [call.match for call in calls])
            del calls  # the next block's take their place in memory
            job.reporter.advance(number, len(blocks))
    healed_model: nn.Module = model
    return healed_model


def _fewer(images: Tensor, held: int, most: int) -> tuple[Tensor, int]:
    if len(images) <= most:
        return images, held
    share = min(max(round(held * most / len(images)), 1), most - 1)
    return torch.cat([images[:share], images[held:][: most - share]]), share


@dataclass(frozen=True)
class _BlockCall:
    """A call of a block in the slim model, with the dense model's output as target."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    aim: Tensor
    match: Match | None
    """Token pairs that the block must merge, so that both models merge the same tokens."""

    def output(self, block: Any) -> Tensor:
        match = self.match
        hook = nullcontext() if match is None else block.matcher.register_forward_hook(lambda *_: match)
        with hook:
            return _run(block, self.args, self.kwargs).to(self.aim.dtype)


def _calls_of(block: Block, cut: ResumableModel, dense: ResumableModel) -> list[_BlockCall]:
    """Run both models to ``block``.

    Return the calls in the slim model, with the dense model's outputs as targets.
    """
    calls = cut.run_up_to(block.name)
    module = cut.model.get_submodule(block.name)
    matches: list[Match | None] = [None] * len(calls)
    # If the dense model does not merge, its blocks need no matches of the slim model.
    if isinstance(getattr(dense.model.get_submodule(block.name), "matcher", None), nn.Module):
        with cut.paused(), torch.no_grad(), captured_outputs(module, ["matcher"]) as outputs:
            for args, kwargs in calls:
                _run(module, args, kwargs)
        matches = outputs.get("matcher", [])
    _answer(dense, block, matches)
    aims = [unmerged(output) for output in dense.run_through(block.name)]
    return [
        _BlockCall(*arguments, aim, match) for arguments, aim, match in zip(calls, aims, matches, strict=True)
    ]


def _answer(model: ResumableModel, block: Block, matches: Sequence[Match | None]) -> None:
    if None not in matches:
        model.run_up_to(f"{block.name}.matcher")
        model.answer(matches)


def _run(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Call ``block`` on copies of its arguments, which it may overwrite, and return its tokens."""
    args, kwargs = tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, dict(kwargs))
    )
    tokens: Tensor = unmerged(block(*args, **kwargs))
    return tokens


def blocks_of(prunable: PrunableLayers) -> tuple[Block, ...]:
    """Return the blocks of a model: the smallest modules with an attention layer and an MLP.

    A layer outside such a module is a block of its own.
    """
    around = {layer.name: _block_around(layer.name, prunable.layers) for layer in prunable.layers}
    names = set(around.values())
    last: dict[str, Layer] = {}
    for layer in prunable.layers:
        name = around[layer.name]
        alone = not name or any(other.startswith(f"{name}.") for other in names)
        last[layer.name if alone else name] = layer
    return tuple(Block(name, layer) for name, layer in last.items())


def _block_around(name: str, layers: Sequence[Layer]) -> str:
    while name:
        inside = (layer for layer in layers if f"{layer.name}.".startswith(f"{name}."))
        if len({layer.adapter.family for layer in inside}) == 2:
            break
        name = name.rpartition(".")[0]
    return name


def _comparable(
    slim: nn.Module, dense: nn.Module, blocks: Iterable[Block], image: Tensor
) -> tuple[list[Block], int]:
    """Return the blocks that both models call once per pass with an output tensor of the same shape."""
    named = {block.name: block for block in blocks}
    in_slim, in_dense = (_outputs(model, named, image) for model in (slim, dense))
    comparable, sizes = [], []
    for name, outputs in in_slim.items():
        both = [*outputs, *in_dense.get(name, ())]
        shapes = {output.shape if isinstance(output, Tensor) else None for output in both}
        if len(outputs) == 1 and len(both) == 2 and len(shapes) == 1 and getattr(outputs[0], "ndim", 0) > 2:
            comparable.append(named[name])
            sizes.append(outputs[0].nbytes)
    if not comparable:
        return [], 0

    def run(images: Tensor) -> list[Tensor]:
        return [output for (output,) in _outputs(slim, [block.name for block in comparable], images).values()]

    dims = channel_dims(slim, run, [block.layer for block in comparable], image)
    # At a block, both models hold its input and output: at most twice the largest output. A pass also stores
    # everything before the first block, and the outputs of finished blocks that are not in a Sequential.
    within = [slim.get_submodule(block.name.rpartition(".")[0]) for block in comparable]
    stored = sum(
        size for size, outer in zip(sizes, within, strict=True) if not isinstance(outer, nn.Sequential)
    )
    waiting = 2 * (2 * max(sizes) + stored)
    for model in (slim, dense):
        with ResumableModel(model, [image]) as resumable:
            resumable.run_up_to(comparable[0].name)
            waiting += resumable.nbytes
    return [replace(block, channel_dim=dim) for block, dim in zip(comparable, dims, strict=True)], waiting


@torch.no_grad()
def _outputs(model: nn.Module, names: Iterable[str], image: Tensor) -> Mapping[str, list[Any]]:
    with captured_outputs(model, names, lambda args, output: unmerged(output)) as outputs:
        model(image)
    return outputs


@dataclass(frozen=True)
class _Error:
    """Squared error of a block's output, weighted by channel and token."""

    channel_dim: int
    channels: Tensor
    """Inverse variance of each channel of the dense block's output, [C]."""
    tokens: Tensor | None
    """Importance of each token, [tokens], with mean 1. None weights all tokens equally."""

    @classmethod
    def of(
        cls, calls: Sequence[_BlockCall], block: Block, fisher: FisherInformation, last: bool, prefix: int
    ) -> _Error:
        """Compute the weights from the dense model's outputs in ``calls``.

        In the last block, tokens that do not affect the model's output get weight 0.
        """
        aims = [_by_token(call.aim, block.channel_dim) for call in calls]
        count = sum(aim[..., 0].numel() for aim in aims)
        mean = torch.stack([aim.double().sum((0, 1)) for aim in aims]).sum(0) / count
        variance = torch.stack([(aim - mean).square().sum((0, 1)) for aim in aims]).sum(0) / count
        # A channel that hardly varies would outweigh all others, whose errors matter as much.
        floor = 1e-6 * float(variance.mean())
        variance = variance.clamp_min(floor) if floor > 0 else torch.ones_like(variance)
        tokens = _importance(fisher, block.layer.name, aims[0].shape, prefix)
        if tokens is not None:
            if last:
                # Importance was shrunk towards 1: this share of it says nothing about a token.
                tokens = (tokens - SHRINKAGE).clamp_min(0)
            tokens = (tokens / tokens.mean()).to(aims[0])
        return cls(block.channel_dim, variance.reciprocal().to(aims[0]), tokens)

    def __call__(self, output: Tensor, aim: Tensor) -> Tensor:
        missing = _by_token(output - aim, self.channel_dim).square()  # (B, tokens, C)
        errors = (missing * self.channels).mean(-1)  # (B, tokens)
        return (errors if self.tokens is None else errors * self.tokens).mean()


def _importance(fisher: FisherInformation, layer: str, shape: torch.Size, prefix: int) -> Tensor | None:
    tokens = fisher.token_importance(layer, shape[:2], shape[0])
    if tokens is not None:
        return tokens[: shape[1]]
    grids = fisher.importance.get(layer, {})
    if not prefix or len(grids) != 1:
        return None
    (tokens,) = grids.values()
    return torch.cat((tokens[:prefix], tokens[prefix:].mean().expand(shape[1] - prefix)))


def _by_token(output: Tensor, channel_dim: int) -> Tensor:
    return output.movedim(channel_dim, -1).flatten(1, -2)


def _train(
    model: nn.Module,
    name: str,
    unseen: Sequence[_BlockCall],
    fit: Sequence[_BlockCall],
    error: _Error,
    job: Job,
    generator: torch.Generator,
    lr: float,
) -> None:
    """Train a block of ``model`` in place, and restore it if the held-out error grows."""
    block = model.get_submodule(name)
    before, stored = _mean_error(block, unseen, error), copy.deepcopy(block.state_dict())
    # Parameters that no module outside of the block uses.
    everywhere = list(model.named_parameters(remove_duplicate=False))
    elsewhere = {id(parameter) for path, parameter in everywhere if not path.startswith(f"{name}.")}
    trained = [parameter for parameter in block.parameters() if id(parameter) not in elsewhere]
    if not trained or not before > MIN_BLOCK_ERROR:
        return
    rounds = (torch.randperm(len(fit), generator=generator).tolist() for _ in repeat(None))
    order = chain.from_iterable(rounds)

    def loss() -> Tensor:
        call = fit[next(order)]
        with torch.autocast(job.device.type, torch.bfloat16, enabled=job.amp), ordered_attention(job.device):
            output = call.output(block)
        return error(output, call.aim)

    for parameter in trained:
        parameter.requires_grad_(True)
    minimise(loss, trained, steps=job.options.healed_steps, lr=lr)
    for parameter in trained:
        parameter.requires_grad_(False)
        parameter.grad = None
    if not _mean_error(block, unseen, error) < before:  # it may be no number
        block.load_state_dict(stored)


@torch.no_grad()
def _mean_error(block: nn.Module, calls: Sequence[_BlockCall], error: _Error) -> float:
    total = sum(float(error(call.output(block), call.aim)) * len(call.aim) for call in calls)
    return total / sum(len(call.aim) for call in calls)
