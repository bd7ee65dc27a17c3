"""Outputs that ``mhacut prune`` preserves, and tokens that the pruned model may leave out."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from mhacut.errors import UnsupportedModelError, option_name
from mhacut.options.prune import PruneOptions
from mhacut.plan import TokenPlan
from mhacut.pruning.preserve import ANSWERS, Preserved
from mhacut.runtime.progress import Reporter
from mhacut.surgery.features import Features, find_layers, find_pyramid, find_token_map
from mhacut.surgery.find import PrunableLayers, classifier_size, find_prunable_layers, gives_probabilities
from mhacut.surgery.hooks import captured_outputs
from mhacut.surgery.read import tokens_read
from mhacut.surgery.tokens import tokens_of, why_not_merged


def outputs_and_tokens(
    options: PruneOptions, dense: nn.Module, input_size: tuple[int, int, int], reporter: Reporter
) -> tuple[Preserved, TokenPlan, bool]:
    """Decide what the pruned model preserves and which tokens it may leave out.

    Args:
        options: of the command.
        dense: the model that was read.
        input_size: [C, H, W] of an image.
        reporter: receives decisions that differ from the usual ones.

    Returns:
        The outputs to preserve, the plan of tokens, and whether more tokens are to be merged.

    Raises:
        UsageError: a layer that the model does not have.
        UnsupportedModelError: the model, or tokens that are left out or merged, do not allow it.
    """
    preserved = _chosen_outputs(options, dense, input_size, reporter)
    merges = _merges_tokens(options, dense)
    return preserved, _tokens_to_keep(dense, options, preserved, reporter), merges


@torch.no_grad()
def layers_that_run(
    model: nn.Module, prunable: PrunableLayers, preserved: Preserved, input_size: tuple[int, int, int]
) -> PrunableLayers:
    """Return the layers that run for the outputs to preserve; nothing says what cuts of others would cost.

    The pooling head of SigLIP does not run for the features of all tokens, nor does the class attention of
    CaiT for the levels of its pyramid.
    """
    names = [layer.name for layer in prunable.layers]
    with captured_outputs(model, names, lambda args, output: None) as called:
        preserved.features.of(model, torch.zeros(1, *input_size))
    idle = [name for name in names if name not in called]
    return prunable.without(idle, f"does not run for {preserved}") if idle else prunable


def _chosen_outputs(
    options: PruneOptions, dense: nn.Module, input_size: tuple[int, int, int], reporter: Reporter
) -> Preserved:
    """Return the outputs to preserve, as ``--preserve`` or the default says; log those of a backbone."""
    asked = options.preserve
    if asked is None:
        return _default(options, dense, input_size, reporter)
    if asked == "answers":
        if not classifier_size(dense):
            raise UnsupportedModelError(
                f"{option_name('preserve', asked)}: the model has no classifier, so there are no answers to "
                "preserve; expected tokens, pooled, pyramid or names of layers"
            )
        return ANSWERS if gives_probabilities(dense) else Preserved.outputs_of(dense)
    if asked == "pooled":
        pooled = Features("pooled" if classifier_size(dense) else "output")
        return Preserved("pooled", "features", pooled)
    try:
        _check_tokens(options, dense)
        found = _dense_outputs(asked, dense, torch.zeros(1, *input_size))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{option_name('preserve', asked)}: {error}") from error
    reporter.log(f"preserving {found}")
    return found


def _default(
    options: PruneOptions, dense: nn.Module, input_size: tuple[int, int, int], reporter: Reporter
) -> Preserved:
    found = Preserved.outputs_of(dense)
    if classifier_size(dense):
        return found
    asked, without = option_name("preserve", "pooled"), "the model has no classifier"
    try:
        _check_tokens(options, dense)
        tokens = _dense_outputs("tokens", dense, torch.zeros(1, *input_size))
    except UnsupportedModelError as reason:
        reporter.log(f"{without}: preserving {found} instead of the features of all tokens: {reason}")
        return found
    reporter.log(f"{without}: preserving {tokens}; {asked} preserves the pooled features instead")
    return tokens


def _dense_outputs(asked: str, dense: nn.Module, image: torch.Tensor) -> Preserved:
    prunable = find_prunable_layers(dense)
    if asked == "tokens":
        return Preserved("tokens", "dense", find_token_map(dense, prunable, image))
    if asked == "pyramid":
        return Preserved("pyramid", "dense", find_pyramid(dense, image))
    names = [name.strip() for name in asked.split(",")]
    return Preserved("layers", "dense", find_layers(dense, names, prunable, image))


def _check_tokens(options: PruneOptions, dense: nn.Module) -> None:
    """Check that the features of all tokens can be preserved.

    Raises:
        UnsupportedModelError: tokens are merged or will be merged, or were left out.
    """
    applied = tokens_of(dense)
    if options.scope.endswith("+tokens"):
        raise UnsupportedModelError(
            f"{option_name('scope', options.scope)} merges tokens, whose own features are then lost; "
            "choose a scope without tokens"
        )
    if applied.merged:
        raise UnsupportedModelError(
            "the checkpoint merges tokens, so it has no features of each token; prune the dense checkpoint"
        )
    if applied.read is not None:
        raise UnsupportedModelError(
            "the last block of the checkpoint computes only the tokens that its classifier reads; prune the "
            f"dense one, or one that was pruned with {option_name('keep_dead_tokens', True)}"
        )


def _merges_tokens(options: PruneOptions, dense: nn.Module) -> bool:
    """Return whether tokens are to be merged.

    Raises:
        UnsupportedModelError: they cannot be.
    """
    if not options.scope.endswith("+tokens"):
        return False
    reason = why_not_merged(dense)
    if reason:
        raise UnsupportedModelError(
            f"{option_name('scope', options.scope)}: tokens cannot be merged: {reason}"
        )
    return True


def _tokens_to_keep(
    dense: nn.Module, options: PruneOptions, preserved: Preserved, reporter: Reporter
) -> TokenPlan:
    """Return the plan of tokens of the model to cut; log why its last block computes all tokens."""
    applied, asked = tokens_of(dense), option_name("keep_dead_tokens", True)
    if applied.read is not None:
        if options.keep_dead_tokens:
            reporter.log(f"{asked} has no effect: the last block of the checkpoint computes no other tokens")
        return applied
    if options.keep_dead_tokens:
        if options.scope.endswith("+tokens"):
            reporter.log(f"{asked}: merged tokens have no features; for those, choose a scope without tokens")
        return applied
    if preserved.dense:
        if classifier_size(dense):
            reporter.log("all tokens of the last block are computed, because their features are preserved")
        return applied
    try:
        if classifier_size(dense) == 0:
            raise UnsupportedModelError("the model has no classifier and outputs features")
        read = tokens_read(dense)
    except UnsupportedModelError as reason:
        reporter.log(f"all tokens of the last block are computed: {reason}")
        return applied
    shown = "token" if read == 1 else f"{read} tokens"
    reporter.log(f"the last block computes only the {shown} that the classifier reads, unless {asked}")
    return replace(applied, read=read)
