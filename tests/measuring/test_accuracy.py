"""Accuracy is what counting by hand gives, or there is none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mhacut.errors import DataError, MhacutError
from mhacut.measuring.accuracy import Evaluation, evaluate

CPU = torch.device("cpu")


class Lookup(nn.Module):
    """Answers image i, whose first pixel is i, with row i of a table of logits."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return self.table[images[:, 0, 0, 0].long()]


def batches(labels: list[int], size: int):
    images = torch.arange(len(labels)).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return list(zip(images.split(size), torch.tensor(labels).split(size), strict=True))


@pytest.mark.parametrize("size", [1, 4, 50])
def test_agrees_with_a_slow_reference(size) -> None:
    table = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(10, (50,), generator=torch.Generator().manual_seed(1)).tolist()
    ranks = [
        sorted(row, reverse=True).index(row[label]) for row, label in zip(table.tolist(), labels, strict=True)
    ]
    found = evaluate(Lookup(table), batches(labels, size), device=CPU)
    assert found.images == 50
    assert found.top1 == pytest.approx(100 * sum(rank < 1 for rank in ranks) / 50)
    assert found.top5 == pytest.approx(100 * sum(rank < 5 for rank in ranks) / 50)
    assert 0 < found.top1 < found.top5 < 100
    assert found.seconds > 0


@pytest.mark.parametrize(("classes", "stated"), [(2, False), (5, False), (6, True)])
def test_top5_is_stated_only_where_it_can_miss(classes, stated) -> None:
    found = evaluate(Lookup(torch.eye(classes)), batches([0] * classes, 4), device=CPU)
    assert found.top1 == pytest.approx(100 / classes)
    assert (found.top5 is not None) == stated


def test_a_model_in_training_is_measured_in_eval_mode_and_left_as_it_was() -> None:
    model = Lookup(torch.eye(3)).train()
    assert evaluate(model, batches([0, 1, 2], 2), device=CPU).top1 == 100
    assert model.training


@pytest.mark.parametrize(("given", "total"), [(list, 3), (iter, 0)])
def test_progress_counts_batches_of_which_a_stream_has_no_total(given, total) -> None:
    steps: list[tuple[int, int]] = []
    loader = given(batches([0] * 5, 2))
    evaluate(Lookup(torch.eye(5)), loader, device=CPU, progress=lambda *step: steps.append(step))
    assert steps == [(1, total), (2, total), (3, total)]


def test_outputs_that_are_not_finite_give_no_accuracy() -> None:
    table = torch.eye(6)
    table[3, 0] = float("nan")  # topk would rank it first
    with pytest.raises(MhacutError, match="not finite for 1 of 4 images of batch 1"):
        evaluate(Lookup(table), batches([0] * 6, 4), device=CPU)


def test_no_images_give_no_accuracy() -> None:
    with pytest.raises(DataError, match="no images"):
        evaluate(Lookup(torch.eye(3)), [], device=CPU)


def test_amp_computes_in_bfloat16() -> None:
    seen = []

    class Linear(nn.Linear):
        def forward(self, images):
            seen.append(super().forward(images.flatten(1)).dtype)
            return super().forward(images.flatten(1))

    for amp in (False, True):
        evaluate(Linear(12, 3), batches([0] * 4, 4), device=CPU, amp=amp)
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(("right", "images"), [(6, 6), (0, 20), (450, 500)])
def test_the_interval_of_few_images_holds_the_accuracy_that_they_were_drawn_with(right, images) -> None:
    """Of accuracies 0..100 %, those within two standard errors are those that often give such answers."""
    found = Evaluation(100 * right / images, None, images, 1.0)
    centre = 100 * (right + 2) / (images + 4)
    for percent in range(1, 100):
        p = percent / 100
        chance = [math.comb(images, k) * p**k * (1 - p) ** (images - k) for k in range(images + 1)]
        likely = min(sum(chance[: right + 1]), sum(chance[right:])) > 0.025
        distance = abs(percent - centre) / found.standard_error
        assert distance < 2.4 if likely else distance > 1.4


def test_labels_state_the_standard_error_of_few_images() -> None:
    assert Evaluation(100.0, None, 6, 1.0).label == "top-1, % of 6 images (± 13)"
    assert Evaluation(80.0, None, 2000, 1.0).label == "top-1, % of 2000 images"
