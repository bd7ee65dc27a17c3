"""Recovery after the cut: steps that bring a slim model nearer to the dense one, if held-out images agree."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mhacut.adapters.base import Layer
from mhacut.pruning.calibrate import Calibration, fewer
from mhacut.pruning.distill import minimise
from mhacut.pruning.fisher import SHRINKAGE, FisherInformation
from mhacut.pruning.job import Job
from mhacut.pruning.merge_law import Schedule
from mhacut.pruning.paper.channel_scales import with_trained_scales
from mhacut.pruning.resumable import ResumableModel
from mhacut.runtime.device import ordered_attention
from mhacut.runtime.progress import Counter
from mhacut.surgery.features import channel_dims
from mhacut.surgery.find import PrunableLayers
from mhacut.surgery.hooks import captured_outputs
from mhacut.surgery.tokens import Match, SizedTokens, merged_of, set_merged


def recover(
    slim: nn.Module, prunable: PrunableLayers, job: Job, calibration: Calibration, merged: Schedule = ()
) -> nn.Module:
    """Return ``slim`` after the steps that the job's options ask for, as far as they help on held-out images.

    Args:
        slim: cut from the job's model, eval mode, float32, on the CPU; so is the result.
        prunable: its prunable layers.
        job: what is pruned.
        calibration: calibration of the job's model.
        merged: number of tokens that each block is to merge; empty to leave the model as it is. Channel
            scales are trained without merges, healing with them.
    """
    options, reporter = job.options, job.reporter
    scale_steps, heal_steps = options.trained_gain_steps, options.healed_steps
    if calibration.held == 0 and (scale_steps or heal_steps):
        reporter.log("nothing was trained: with a single image, none is left to check the result on")
        scale_steps = heal_steps = 0
    slim = slim.to(job.device)
    if scale_steps:
        reporter.start("reweighting")
        learning, lr = job.training(calibration), options.gain_lr
        scaled = with_trained_scales(slim, prunable, learning, steps=scale_steps, lr=lr, reporter=reporter)
        slim = _better(slim, scaled, job, calibration, "training channel scales")
    if merged:
        set_merged(slim, merged)
    if heal_steps:
        reporter.start("healing")
        slim = _better(slim, healed(slim, prunable, job, calibration), job, calibration, "healing")
    return slim.cpu()


def _better(slim: nn.Module, changed: nn.Module, job: Job, calibration: Calibration, name: str) -> nn.Module:
    """Return ``changed`` if it diverges less from the dense model on held-out images, else ``slim``.

    These images also chose the ridges of the repair, which favours ``slim``.
    """
    judge = job.held_out(calibration)
    before, after = judge.divergence_of(slim), judge.divergence_of(changed)
    helps = after < before  # not where training diverged, to no number
    job.reporter.log(
        f"{name}{'' if helps else ' was left out'}: divergence on held-out images "
        f"{before:.2g} without, {after:.2g} with"
    )
    return changed if helps else slim


LR = 7e-4
"""Learning rate of the first step of each block."""
BATCH = 8
"""Most images per step: many steps of few images learn more in the same time."""
MOST_BYTES = 5 * 2**29
"""Bounds the memory of the images and of the activations that both models keep for them: inputs and outputs
of blocks, and of the layers before the first block."""
NEGLIGIBLE = 1e-6
"""Error, relative to the variance of the dense block's output, below which a block is not trained."""


@dataclass(frozen=True)
class Block:
    """A module that is trained as a whole."""

    name: str
    layer: Layer
    """The last prunable layer in the block; its tokens are those of the block's output."""
    channel_dim: int = -1
    """Dimension of the channels in the block's output, once it has run; it may not be the layer's."""
    nbytes: int = 0
    """Size of the output for one image, once it has run."""


def healed(slim: nn.Module, prunable: PrunableLayers, job: Job, calibration: Calibration) -> nn.Module:
    """Return a copy of ``slim`` whose blocks were trained in order to reproduce those of the dense model.

    The input of a block is the output of the healed blocks before it. Unlike a refit of output projections,
    this also changes the weights before the nonlinearities. If the slim model merges tokens, the dense model
    merges the same ones, so that tokens stand for the same patches. Ours; STARFISH (arXiv 2606.01126) trains
    all blocks at once by one loss.

    A block keeps its weights if training does not help on held-out images.
    Weights that another module uses too are not trained, nor are those outside the blocks.

    Args:
        slim: cut from the job's model, eval mode, float32, on the job's device; not modified.
        prunable: prunable layers of ``slim``.
        job: what is pruned; its images are fewer where :data:`MOST_BYTES` does not allow all.
        calibration: of the job's model: how many images are held out, and how much each token counts.
    """
    model = copy.deepcopy(slim)
    teacher = _merging_as(slim, job.model)
    image = job.images[:1].to(job.device)
    blocks, bytes_per_image = _comparable(model, teacher, blocks_of(prunable), image)
    if not blocks:
        return model
    bytes_per_image += sum(_bytes_before(blocks[0], part, image) for part in (model, teacher))
    most = max(2, MOST_BYTES // bytes_per_image)
    images, held = fewer(job.images, calibration.held, most)
    images, size = images.to(job.device), min(job.options.batch_size, BATCH)
    unseen, fit = images[:held].split(size), images[held:].split(size)
    generator = torch.Generator().manual_seed(job.options.seed)
    counter = Counter(job.reporter, len(blocks) * job.options.healed_steps)
    with ResumableModel(model, [*unseen, *fit]) as cut, ResumableModel(teacher, [*unseen, *fit]) as dense:
        for block in blocks:
            calls = _calls_of(block, cut, dense)
            last = block is blocks[-1]
            error = _Error.of(calls[len(unseen) :], block, calibration.fisher, last, _prefix(slim))
            parts = (calls[: len(unseen)], calls[len(unseen) :])
            with cut.paused():
                _train(model, block.name, parts, error, job, generator, counter)
            _answer(cut, block, [call.found for call in calls])
            del calls, parts  # the next block's take their place
    return model


def _calls_of(block: Block, cut: ResumableModel, dense: ResumableModel) -> list[_Call]:
    """Run both models to ``block``; return its calls in the slim model, and their target outputs."""
    given = cut.run_up_to(block.name)
    with cut.paused():
        matches = _matches(cut.model.get_submodule(block.name), given)
    _answer(dense, block, matches)
    (passes,) = dense.run_to(block.name)
    aims = [_tokens(output) for _, output in passes]
    return [_Call(*arguments, aim, found) for arguments, aim, found in zip(given, aims, matches, strict=True)]


def _merging_as(slim: nn.Module, dense: nn.Module) -> nn.Module:
    """Return ``dense``, or a copy that merges as many tokens as ``slim`` does."""
    merged = merged_of(slim)
    if merged == merged_of(dense):
        return dense
    dense = copy.deepcopy(dense)
    set_merged(dense, merged)
    return dense


def _prefix(model: Any) -> int:
    """Number of first tokens that are never merged."""
    prefix: int = model.num_prefix_tokens if merged_of(model) else 0
    return prefix


def _matches(block: nn.Module, given: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Match | None]:
    """Match the tokens of each call of ``block``, None where it merges none."""
    if not isinstance(getattr(block, "matcher", None), nn.Module):
        return [None] * len(given)
    with torch.no_grad(), captured_outputs(block, ["matcher"]) as found:
        for args, kwargs in given:
            _run(block, args, kwargs)
    return found.get("matcher", [])


def _answer(model: ResumableModel, block: Block, matches: Sequence[Match | None]) -> None:
    """Let the block of ``model`` merge the tokens in ``matches``."""
    if None not in matches:
        model.run_up_to(f"{block.name}.matcher")
        model.answer(matches)


@contextmanager
def _matching(block: Any, found: Match | None) -> Iterator[None]:
    """Let ``block`` merge the tokens in ``found`` instead of those it would choose itself."""
    if found is None:
        yield
        return
    with block.matcher.register_forward_hook(lambda module, args, output: found):
        yield


def _run(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Call ``block`` on copies of the arguments, which it may overwrite, and return its tokens."""
    args, kwargs = tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, dict(kwargs))
    )
    tokens: Tensor = _tokens(block(*args, **kwargs))
    return tokens


def _tokens(output: Any) -> Any:
    return output.x if isinstance(output, SizedTokens) else output


def blocks_of(prunable: PrunableLayers) -> tuple[Block, ...]:
    """Return the blocks of a model: the smallest modules that hold an attention layer and an MLP.

    Layers without such a module, or in one that holds blocks itself, are blocks by themselves.
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
    """Name of the smallest module around a layer that holds layers of both families; "" for the model."""
    while name:
        inside = (layer for layer in layers if f"{layer.name}.".startswith(f"{name}."))
        if len({layer.adapter.family for layer in inside}) == 2:
            break
        name = name.rpartition(".")[0]
    return name


def _comparable(
    slim: nn.Module, dense: nn.Module, blocks: Iterable[Block], image: Tensor
) -> tuple[tuple[Block, ...], int]:
    """Find the blocks that both models run once per pass and that give one tensor of the same shape.

    Returns:
        The blocks, in the order in which ``slim`` runs them, and the bytes that wait for one image.
    """
    named = {block.name: block for block in blocks}
    in_slim, in_dense = (_calls(model, named, image) for model in (slim, dense))
    found = []
    for name, outputs in in_slim.items():
        shapes = [_shape(output) for output in outputs]
        if len(outputs) == 1 and None not in shapes and shapes == [*map(_shape, in_dense.get(name, ()))]:
            found.append(replace(named[name], nbytes=outputs[0].nbytes))
    # A Sequential passes outputs on; other modules keep those of all that they have run so far.
    passed_on, kept = [0], [0]
    for block in found:
        within = slim.get_submodule(block.name.rpartition(".")[0])
        (passed_on if isinstance(within, nn.Sequential) else kept).append(block.nbytes)
    return _with_channel_dims(slim, found, image), 2 * (2 * max(passed_on + kept) + sum(kept))


def _with_channel_dims(model: nn.Module, blocks: Sequence[Block], image: Tensor) -> tuple[Block, ...]:
    def run(images: Tensor) -> list[Tensor]:
        return [output for (output,) in _calls(model, [block.name for block in blocks], images).values()]

    dims = channel_dims(model, run, [block.layer for block in blocks], image)
    return tuple(replace(block, channel_dim=dim) for block, dim in zip(blocks, dims, strict=True))


def _bytes_before(block: Block, model: nn.Module, image: Tensor) -> int:
    """Size of what a pass of ``image`` keeps when it reaches the first block, the image included."""
    with ResumableModel(model, [image]) as one:
        one.run_up_to(block.name)
        return one.nbytes


def _shape(output: object) -> torch.Size | None:
    return output.shape if isinstance(output, Tensor) and output.ndim > 2 else None


@torch.no_grad()
def _calls(model: nn.Module, names: Iterable[str], image: Tensor) -> Mapping[str, list[Any]]:
    """Outputs of each call of these modules, in the order of their first calls."""
    with captured_outputs(model, names, lambda args, output: _tokens(output)) as outputs:
        model(image)
    return outputs


@dataclass(frozen=True)
class _Call:
    """Arguments of one call of a block of the slim model, and the dense model's output to aim at."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    aim: Tensor
    found: Match | None
    """Tokens that the block must merge, if any."""

    def output(self, block: nn.Module) -> Tensor:
        """Return the tokens that ``block`` gives."""
        with _matching(block, self.found):
            return _run(block, self.args, self.kwargs).to(self.aim.dtype)


@dataclass(frozen=True)
class _Error:
    """Squared error of a block's output, weighted by channel and by token; about 1 if the output is noise."""

    channel_dim: int
    channels: Tensor
    """One over the variance of each channel of the dense output over all tokens and images, [C]."""
    tokens: Tensor | None
    """Importance of each token, mean 1, [tokens]; None if all count alike."""

    @classmethod
    def of(
        cls, calls: Sequence[_Call], block: Block, fisher: FisherInformation, last: bool, prefix: int
    ) -> _Error:
        """Weigh the outputs that ``calls`` aim at.

        Args:
            calls: those to fit.
            block: the block.
            fisher: with the importance of tokens.
            last: whether no other block follows. Then tokens that nothing reads do not count, because their
                errors do not spread further.
            prefix: number of tokens that are never merged, if others are.
        """
        aims = [_by_token(call.aim, block.channel_dim) for call in calls]
        count = sum(aim[..., 0].numel() for aim in aims)
        mean = torch.stack([aim.double().sum((0, 1)) for aim in aims]).sum(0) / count
        variance = torch.stack([(aim - mean).square().sum((0, 1)) for aim in aims]).sum(0) / count
        floor = 1e-6 * float(variance.mean())
        variance = variance.clamp_min(floor) if floor > 0 else torch.ones_like(variance)
        tokens = _importance(fisher, block.layer.name, aims[0].shape, prefix)
        if tokens is not None:
            if last:
                tokens = (tokens - SHRINKAGE).clamp_min(0)
            tokens = (tokens / tokens.mean()).to(aims[0])
        return cls(block.channel_dim, variance.reciprocal().to(aims[0]), tokens)

    def __call__(self, output: Tensor, aim: Tensor) -> Tensor:
        """Return the error, a scalar."""
        missing = _by_token(output - aim, self.channel_dim).square()  # (B, tokens, C)
        errors = (missing * self.channels).mean(-1)  # (B, tokens)
        return (errors if self.tokens is None else errors * self.tokens).mean()


def _importance(fisher: FisherInformation, layer: str, shape: torch.Size, prefix: int) -> Tensor | None:
    """Importance of each token of an output [B, tokens, C]; merged ones count as a patch does on average."""
    tokens = fisher.token_importance(layer, shape[:2], shape[0])
    if tokens is not None:
        return tokens[: shape[1]]
    grids = fisher.importance.get(layer, {})
    if not prefix or len(grids) != 1:
        return None
    (tokens,) = grids.values()
    return torch.cat((tokens[:prefix], tokens[prefix:].mean().expand(shape[1] - prefix)))


def _by_token(output: Tensor, channel_dim: int) -> Tensor:
    """Reshape to [B, tokens, C]."""
    return output.movedim(channel_dim, -1).flatten(1, -2)


def _train(
    model: nn.Module,
    name: str,
    parts: tuple[Sequence[_Call], Sequence[_Call]],
    error: _Error,
    job: Job,
    generator: torch.Generator,
    counter: Counter,
) -> None:
    """Train one block in place; put its weights back if that does not help.

    Args:
        model: whose block it is.
        name: of the block.
        parts: held-out calls, and calls to train on.
        error: what to minimise.
        job: its steps, and whether to use autocast.
        generator: of the order of the batches.
        counter: counts steps.
    """
    block, (unseen, fit), steps = model.get_submodule(name), parts, job.options.healed_steps
    before, stored = _mean_error(block, unseen, error), copy.deepcopy(block.state_dict())
    trained = _own_parameters(model, name) if before > NEGLIGIBLE else []
    if not trained:
        counter.add(steps)
        return
    order, left = _shuffled(len(fit), generator), steps

    def loss() -> Tensor:
        nonlocal left
        call = fit[next(order)]
        with torch.autocast(job.device.type, torch.bfloat16, enabled=job.amp), ordered_attention(job.device):
            output = call.output(block)
        counter.add(1)
        left -= 1
        return error(output, call.aim)

    for parameter in trained:
        parameter.requires_grad_(True)
    minimise(loss, trained, steps=steps, lr=LR)
    counter.add(left)  # of training that diverged
    for parameter in trained:
        parameter.requires_grad_(False)
        parameter.grad = None
    if not _mean_error(block, unseen, error) < before:  # it may be no number
        block.load_state_dict(stored)


@torch.no_grad()
def _mean_error(block: nn.Module, calls: Sequence[_Call], error: _Error) -> float:
    """Error of ``block``, mean over images."""
    total = sum(float(error(call.output(block), call.aim)) * len(call.aim) for call in calls)
    return total / sum(len(call.aim) for call in calls)


def _own_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """Parameters of a module of ``model`` that no module outside of it uses."""
    everywhere = list(model.named_parameters(remove_duplicate=False))
    elsewhere = {id(parameter) for path, parameter in everywhere if not path.startswith(f"{name}.")}
    return [p for p in model.get_submodule(name).parameters() if id(p) not in elsewhere]


def _shuffled(count: int, generator: torch.Generator) -> Iterator[int]:
    """Endless indices, in another order each round."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
