"""Outputs of the dense model to preserve, and the divergence of another model's outputs from them.

Fisher information, sensitivity curves, recovery and the final measurement all use one tensor per image:
logits, pooled features, or the features of all tokens, whitened so that half the squared distance is the
divergence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhacut.errors import UnsupportedModelError, option_name
from mhacut.linalg.moments import Moments
from mhacut.runtime.distributed import Processes
from mhacut.runtime.progress import Reporter
from mhacut.surgery.features import Features, find_layers, find_pyramid, find_token_map
from mhacut.surgery.find import classifier_size, find_prunable_layers, gives_probabilities
from mhacut.surgery.tokens import tokens_of

MAX_BYTES = 2**30
"""Maximum memory for the dense model's features of all calibration images. If all tokens need more, every
n-th token is used."""
FITTED_IMAGES = 64
"""Maximum number of images for estimating covariances and variances of features."""

SHRINKAGE = 0.5
"""Weight of the diagonal in the shrunk covariance of features. Results hardly depend on the weight
(docs/explanation/choices.md)."""
FLOOR = 1e-6
"""Smallest variance of a feature channel, relative to the mean variance over channels."""
KEPT = 0.1
"""Weight of an unweighted feature error, which is added to the feature error weighted by a task loss."""

What = Literal["answers", "pooled", "tokens", "pyramid", "layers", "outputs"]
OutputMetric = Literal["answers", "features", "dense"]


@dataclass(frozen=True)
class Whitening:
    """Map of features f to z = W^T (f - m), for which 1/2 |z - z'|^2 is a divergence in nats.

    For normal distributions of covariance S, KL(N(f, S) || N(f', S)) = 1/2 (f - f')^T S^-1 (f - f') (Kullback
    1959, chapter 9). S is the covariance of the dense features over tokens and images, shrunk towards its
    diagonal (target D of Schaefer & Strimmer 2005). Without shrinkage, the inverse of an estimate from few
    images exaggerates errors in directions of low variance.
    """

    mean: Tensor
    matrix: Tensor
    """Matrix W, [C, C], with W W^T = S^-1: inverse transposed Cholesky factor of S."""

    @classmethod
    def of(cls, moments: Moments, metric: Tensor | None = None) -> Whitening:
        """Return the whitening of features: a root of ``metric``, by default half the inverse covariance."""
        covariance = moments.covariance
        variance = covariance.diagonal()
        # Where nothing varies, what is left is rounding, in proportion to the features' energy.
        usual = torch.maximum(variance.mean(), 1e-6 * moments.energy.diagonal().mean())
        floor = (FLOOR * usual).clamp_min(torch.finfo(torch.float32).tiny)
        shrunk = (1 - SHRINKAGE) * covariance
        shrunk.diagonal().copy_(variance.clamp_min(floor))
        factor = torch.linalg.cholesky(shrunk)
        eye = torch.eye(len(variance), dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
        if metric is not None:
            whitened = 2 * factor.mT @ metric.to(factor) @ factor
            whitened += KEPT * whitened.trace() / len(eye) * eye
            inverse = torch.linalg.cholesky(whitened).mT @ inverse
        return cls(moments.mean.float(), inverse.mT.float())

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean.to(features)) @ self.matrix.to(features)


@dataclass(frozen=True)
class Preserved:
    what: What
    metric: OutputMetric
    """Divergence: ``answers``: KL in nats of class probabilities; ``features``: squared error relative to the
    variance; ``dense``: KL in nats per token of Gaussians (:class:`Whitening`), the
    mean over tokens and over layers or levels."""
    features: Features
    whitenings: tuple[Whitening, ...] = ()
    """Whitening of each preserved feature map, set by :meth:`fitted`."""
    metrics: tuple[Tensor, ...] = ()
    """Task-loss metric of each feature map, for :meth:`Whitening.of`. Empty without a task loss."""
    variance: float = 1.0
    """Variance of all preserved values, which scales their squared error. Set by :meth:`fitted`."""
    steps: int = 1
    """Stride between compared tokens; 1 compares all tokens."""

    @classmethod
    def outputs_of(cls, model: nn.Module) -> Preserved:
        """Return the model's own outputs: logits, or pooled features without a classifier."""
        if gives_probabilities(model):
            return ANSWERS
        classes = getattr(model, "num_classes", 0)
        return cls("answers" if classes else "pooled", "features", Features("output"))

    @property
    def dense(self) -> bool:
        return self.metric == "dense"

    def outputs(
        self, model: nn.Module, images: Tensor, tensors: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return logits or pooled features [B, ...], or whitened dense features [B, tokens * C]."""
        features = self.features.of(model, images, tensors)
        if not self.dense:
            return features[0]
        with torch.autocast(images.device.type, enabled=False):
            parts = []
            for level, whitening in zip(features, self.whitenings, strict=True):
                tokens = level[:, :: self.steps]  # (B, tokens, C)
                tokens = tokens.float() if tokens.dtype.itemsize < 4 else tokens
                parts.append((whitening(tokens) * (len(features) * tokens.shape[1]) ** -0.5).flatten(1))
            return torch.cat(parts, 1)

    def divergence(self, outputs: Tensor, dense: Tensor) -> Tensor:
        if self.metric == "answers":
            return F.kl_div(
                outputs.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="batchmean"
            )
        if self.metric == "dense":
            return (outputs - dense).square().sum(-1).mean() / 2
        return (outputs - dense).square().mean() / self.variance

    def projected(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Return a random projection of the outputs with gradient g and E[g g^T] = Hessian of the divergence.

        For logits with probabilities p and noise eps, the projection is sum_c eps_c sqrt(p_c) log p_c, and
        E[g g^T] is the Fisher information.
        """
        if self.metric == "answers":
            # E = sum_c p_c grad(log p_c) grad(log p_c)^T; sqrt(p_c) is a weight here, and takes no gradient.
            logs = outputs.float().log_softmax(-1)
            return (noise * logs.detach().mul(0.5).exp() * logs).sum()
        if self.metric == "dense":
            return (noise * outputs).sum()
        return (noise * outputs.float()).sum() / math.sqrt(self.variance * outputs[0].numel() / 2)

    @torch.no_grad()
    def fitted(self, model: nn.Module, images: Tensor, batch_size: int, processes: Processes) -> Preserved:
        """Return a copy with the whitening or variance of the dense model's features."""
        if self.metric == "answers":
            return self
        device = next(model.parameters()).device
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(images[:FITTED_IMAGES].split(batch_size)):
            if number % processes.size != processes.rank:
                continue
            for index, features in enumerate(self.features.of(model, batch.to(device))):
                moments = Moments.of(features.flatten(0, 1) if self.dense else features.reshape(-1, 1))
                rows = torch.tensor(float(moments.rows), dtype=torch.float64, device=device)
                for name, part in (("rows", rows), ("total", moments.total), ("second", moments.second)):
                    key = f"{index} {name}"
                    sums[key] = sums[key] + part if key in sums else part
        sums = processes.summed(sums)
        fitted = [
            Moments(int(sums[f"{index} rows"]), sums[f"{index} total"], sums[f"{index} second"])
            for index in range(len(sums) // 3)
        ]
        if self.dense:
            metrics = self.metrics or [None] * len(fitted)
            return replace(self, whitenings=tuple(map(Whitening.of, fitted, metrics)))
        (values,) = fitted
        if values.rows == 1:  # one value alone has no variance
            return self
        variance = float(values.covariance) * values.rows / (values.rows - 1)
        return replace(self, variance=max(variance, 1e-12))

    @torch.no_grad()
    def thinned(self, model: nn.Module, image: Tensor, images: int) -> Preserved:
        """Return a copy with fewer tokens, so that the features of ``images`` images fit into memory."""
        if not self.dense:
            return self
        image_bytes = sum(features[0].numel() * 4 for features in self.features.of(model, image))
        return replace(self, steps=max(1, -(-image_bytes * images // MAX_BYTES)))

    def to_json(self) -> dict[str, Any]:
        chosen = {"layers": list(self.features.layers), "levels": list(self.features.levels)}
        return {"what": self.what, **{name: value for name, value in chosen.items() if value}}

    def __str__(self) -> str:
        names = {
            "answers": "the answers",
            "outputs": "the outputs that the model reads",
            "tokens": "the features of all tokens (the final normalised map)",
            "layers": f"the features of all tokens after {', '.join(self.features.layers)}",
            "pyramid": f"the {len(self.features.levels)} feature maps of features_only",
        }
        return names.get(self.what, "the pooled features")


ANSWERS = Preserved("answers", "answers", Features("output"))


def find_preserved(
    model: nn.Module, what: str | None, size: tuple[int, ...], reporter: Reporter
) -> Preserved:
    """Return the outputs that ``--preserve`` names: by default logits, or tokens without a classifier."""
    classes, image = classifier_size(model), torch.zeros(1, *size)
    if what == "pooled":
        return Preserved("pooled", "features", Features("pooled" if classes else "output"))
    if what in (None, "answers") and classes:
        return ANSWERS if gives_probabilities(model) else Preserved.outputs_of(model)
    if what == "answers":
        raise UnsupportedModelError(
            f"{option_name('preserve', what)}: the model has no classifier; expected tokens, pooled, pyramid "
            "or names of layers"
        )
    try:
        applied = tokens_of(model)
        if (applied.merged and not applied.unmerge) or applied.output_tokens is not None:
            raise UnsupportedModelError(
                "the checkpoint merges or drops tokens, so token features are missing. Prune the dense "
                f"model, or a model pruned with {option_name('keep_dead_tokens', True)}"
            )
        if what == "pyramid":
            preserved = Preserved("pyramid", "dense", find_pyramid(model, image))
        elif what in (None, "tokens"):
            features = find_token_map(model, find_prunable_layers(model), image)
            preserved = Preserved("tokens", "dense", features)
        else:
            names = [name.strip() for name in str(what).split(",")]
            features = find_layers(model, names, find_prunable_layers(model), image)
            preserved = Preserved("layers", "dense", features)
    except UnsupportedModelError as error:
        if what is not None:
            raise UnsupportedModelError(f"{option_name('preserve', what)}: {error}") from error
        preserved = Preserved.outputs_of(model)
        reporter.log(f"features of tokens cannot be preserved: {error}")
    reporter.log(
        f"preserving {preserved}" if what else f"the model has no classifier: preserving {preserved}"
    )
    return preserved
