"""An optimiser step: optimiser, learning rate schedule, weight averaging and precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import model_parameters
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mhacut.errors import MhacutError, UsageError, option_name
from mhacut.finetuning.images import Batch, mixed_seed, seed_everything
from mhacut.finetuning.objective import Mixing, Objective
from mhacut.options.finetune import FinetuneOptions
from mhacut.options.option import unknown_option
from mhacut.runtime.device import has_bfloat16, refusing_compile
from mhacut.runtime.distributed import Processes

_MODEL_STREAM, _MIXING_STREAM = 1, 2
"""Numbers that make the seeds for the model and for mixup different."""


class Trainer:
    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        mixing: Mixing,
        options: FinetuneOptions,
        processes: Processes,
        *,
        labelled: bool,
        total_steps: int,
        steps_per_epoch: int,
    ) -> None:
        self.model, self.objective, self.mixing = model, objective, mixing
        self.options, self.processes, self.labelled = options, processes, labelled
        self.device = processes.device
        set_drop_path(model, options.drop_path)
        if options.grad_checkpointing:
            _checkpoint_gradients(model)
        self.optimizer = _optimizer(model, options)
        self.schedule = _schedule(self.optimizer, options, total_steps, steps_per_epoch)
        self.average = (
            ModelEmaV3(model, decay=options.model_ema_decay, use_warmup=options.model_ema_warmup)
            if options.model_ema
            else None
        )
        half = options.amp and options.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.network: Any = model
        """The model; after :meth:`connect`, its wrapper for several processes and ``--compile``."""

    def connect(self) -> None:
        """Wrap the model for distributed training and ``--compile``. Every process must call this method."""
        self.network = _network(self.model, self.options, self.processes)

    def disconnect(self) -> None:
        # The wrapper holds the process group. If it were freed last, Python would wait for a thread of the
        # group while holding the lock the thread needs: sometimes a process never ended.
        self.network = self.model

    @property
    def result(self) -> nn.Module:
        """The model to measure and write: the weight average if there is one, else the trained model."""
        return self.model if self.average is None else self.average.module

    @property
    def lr(self) -> float:
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def step(self, number: int, batches: Iterable[Batch]) -> tuple[float, int]:
        """Run training step ``number`` on ``batches``.

        Return the sum of the losses and the number of images.
        """
        options = self.options
        self.schedule.step_update(number)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        images = 0
        for position, batch in enumerate(batches):
            last = position == options.grad_accum_steps - 1
            seed = mixed_seed(options.seed, _MODEL_STREAM, number, self.processes.rank, position)
            seed_everything(seed)
            if self.device.type == "cuda":  # else stochastic depth would differ in a resumed run
                torch.cuda.manual_seed(seed)
            with self._gradients_shared(last), refusing_compile(option_name("compile", True)):
                loss = self._loss(number, batch)
                # Every part has as many images: the mean over parts is the mean over the step's images.
                scaled: Any = self.scaler.scale(loss / options.grad_accum_steps)
                scaled.backward()
            losses.append(loss.detach() * len(batch.images))
            images += len(batch.images)
        if options.clip_grad:
            self.scaler.unscale_(self.optimizer)
            # As timm: the head's gradient is large when training begins, and agc would hold it back.
            clipped = model_parameters(self.model, exclude_head=options.clip_mode == "agc")
            dispatch_clip_grad(clipped, options.clip_grad, mode=options.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            # The step sets the decay of the warm-up: it must not begin again in a resumed run.
            self.average.update(self.model, step=number + 1)
        return float(torch.stack(losses).sum()), images

    def _loss(self, number: int, batch: Batch) -> Tensor:
        moved = batch.images.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True) if self.labelled else None
        # One draw per step, so that its parts are mixed in the same way in every process.
        seed = mixed_seed(self.options.seed, _MIXING_STREAM, number)
        moved, labels = self.mixing(moved, labels, seed)
        if self.options.channels_last:
            moved = moved.contiguous(memory_format=torch.channels_last)
        dtype = getattr(torch, self.options.amp_dtype)
        with torch.autocast(self.device.type, dtype, enabled=self.options.amp):
            teacher_targets = self.objective.teacher_targets(moved)
            outputs = self.network(moved)
        return self.objective(outputs, labels, teacher_targets)

    def _gradients_shared(self, shared: bool) -> AbstractContextManager[object]:
        """Return a context for a backward pass that sums gradients over processes if ``shared`` is True."""
        if self.processes.size > 1 and not shared:
            unshared: AbstractContextManager[object] = self.network.no_sync()  # also where it is compiled
            return unshared
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])


def set_drop_path(model: nn.Module, rate: float) -> None:
    """Set stochastic depth that grows linearly from 0 to ``rate`` over the blocks (arXiv 1603.09382)."""
    # A block is a module with places for it: some have one, after attention or the MLP, most have one each.
    blocks = []
    for module in model.modules():
        places = [
            (module, name)
            for name, child in module.named_children()
            if name in ("drop_path", "drop_path1", "drop_path2") and isinstance(child, nn.Identity | DropPath)
        ]
        if places:
            blocks.append(places)
    if rate > 0 and not blocks:
        raise UsageError(
            f"{option_name('drop_path', rate)}: this model has no stochastic depth; leave the option out"
        )
    for number, places in enumerate(blocks):
        share = rate * number / max(1, len(blocks) - 1)
        for module, name in places:
            setattr(module, name, DropPath(share) if share > 0 else nn.Identity())


def _checkpoint_gradients(model: Any) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:  # timm's answers where a model lacks it
        raise UsageError(
            f"{option_name('grad_checkpointing', True)}: this model does not support it; leave the option out"
        ) from error


def _optimizer(model: nn.Module, options: FinetuneOptions) -> torch.optim.Optimizer:
    known = tuple(list_optimizers())
    if options.opt not in known:
        unknown = unknown_option(options.opt, known, "optimiser")
        raise UsageError(f"{option_name('opt', options.opt)}: {unknown}")
    if options.layer_decay is not None and not hasattr(model, "group_matcher"):
        option = option_name("layer_decay", options.layer_decay)
        raise UsageError(f"{option}: timm does not define layer groups for this model; leave the option out")
    try:
        made: torch.optim.Optimizer = create_optimizer_v2(
            model,
            opt=options.opt,
            lr=options.lr,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            layer_decay=options.layer_decay,
        )
    except (TypeError, ValueError, RuntimeError, ImportError, AssertionError) as error:
        raise UsageError(f"{option_name('opt', options.opt)}: cannot be created: {error}") from error
    if getattr(made, "is_second_order", False):
        raise UsageError(
            f"{option_name('opt', options.opt)}: requires second derivatives; use another optimiser"
        )
    return made


def _schedule(
    optimizer: torch.optim.Optimizer, options: FinetuneOptions, total_steps: int, steps_per_epoch: int
) -> Any:
    """Return timm's learning rate schedule, counted in steps. It depends only on the step number."""
    # timm counts epochs, of which fractions are lost; here a step takes their place.
    epochs, rate = options.warmup_epochs, options.lr or 0.0  # which is chosen by now
    # Adam's first steps go by the sign of a single gradient.
    warmup = total_steps // 10 if epochs is None else round(epochs * steps_per_epoch)
    if warmup >= total_steps:
        option = option_name("warmup_epochs", options.warmup_epochs)
        raise UsageError(f"{option}: warm-up takes {warmup} of only {total_steps} steps; use less")
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=options.sched,
        num_epochs=total_steps,
        decay_epochs=max(1, round(options.decay_epochs * steps_per_epoch)),
        decay_rate=options.decay_rate,
        min_lr=min(options.min_lr, rate),
        warmup_lr=min(options.warmup_lr, rate),
        warmup_epochs=warmup,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return schedule


def _network(model: nn.Module, options: FinetuneOptions, processes: Processes) -> Any:
    network: Any = model
    if processes.size > 1:
        ids = [processes.device.index] if processes.device.type == "cuda" else None
        network = DistributedDataParallel(network, device_ids=ids)
    if options.compile:
        network = torch.compile(network)
    return network


def check_precision(options: FinetuneOptions, device: torch.device) -> None:
    if not options.amp:
        return
    if device.type == "cpu" and options.amp_dtype == "float16":
        raise UsageError(f"{option_name('amp_dtype', 'float16')}: requires CUDA; use bfloat16 on the CPU")
    if device.type == "cuda" and options.amp_dtype == "bfloat16" and not has_bfloat16(device):
        float16 = option_name("amp_dtype", "float16")
        raise MhacutError(f"{option_name('amp', True)}: this GPU does not support bfloat16; use {float16}")
