"""Vision transformers inside other models, pruned in place."""

from __future__ import annotations

import copy
import re

import pytest
import timm
import torch
from torch import nn

import mhacut
from helpers.huggingface import Segmenter, TinyAttention, TinyBackbone
from helpers.jobs import Recorder
from helpers.models import relative
from mhacut.errors import BudgetError, CheckpointError, DataError, UnsupportedModelError, UsageError

QUICK = {"effort": "fast", "flops": "60%"}


@pytest.fixture(scope="module")
def images():
    return torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def build(cls=Segmenter, *args):
    torch.manual_seed(0)
    model = cls(*args).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def masks_of(model, images):
    with torch.no_grad():
        return model(images)["masks"]


@pytest.fixture(scope="module")
def pruned(images):
    model = build()
    before = copy.deepcopy(model)
    return before, model, mhacut.prune_(model, images=images.split(8), **QUICK)


def test_the_backbone_is_found_and_the_whole_model_goes_on(pruned, images):
    before, model, result = pruned
    assert result.part == "backbone"
    assert result.flops_after <= 0.6 * result.flops_before
    assert result.preserved == ("hidden_states[1]", "hidden_states[2]")  # what the head reads
    assert re.match(r"`backbone`: \S+ -> \S+ FLOPs \(\d+\.\d%\), divergence of ", repr(result))
    assert model.state_dict().keys() == before.state_dict().keys()
    cut = [layer.attention for layer in model.backbone.layer]
    assert {type(layer) for layer in cut} == {TinyAttention}
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in before.parameters())
    dense = masks_of(before, images)
    assert 0 < relative(masks_of(model, images), dense) < 1
    exported = torch.export.export(model, (images[:2],)).module()
    assert relative(exported(images[:2])["masks"].detach(), masks_of(model, images[:2])) < 1e-5
    model.train()(images)["masks"].sum().backward()
    assert all(p.grad is not None for p in model.backbone.layer.parameters())
    assert {name: p for name, p in model.named_parameters() if name.startswith("head")}.keys()
    assert all(
        torch.equal(p, q) for p, q in zip(model.head.parameters(), before.head.parameters(), strict=True)
    )


def test_a_file_opens_in_a_model_that_is_built_anew(pruned, images, tmp_path):
    before, model, _ = pruned
    file = tmp_path / "backbone.safetensors"
    mhacut.save_pruned(model.eval(), file)
    fresh = build()
    mhacut.apply_pruned(fresh, file)
    assert torch.equal(masks_of(fresh, images), masks_of(model, images))
    alone = build(TinyBackbone)  # the part without the model around it
    mhacut.apply_pruned(alone, file)
    assert alone.layer[0].mlp.fc1.out_features == model.backbone.layer[0].mlp.fc1.out_features
    with pytest.raises(UsageError, match="`backbone` was pruned already"):
        mhacut.apply_pruned(fresh, file)
    with pytest.raises(UsageError, match="`backbone` was pruned already"):
        mhacut.prune_(model, images=images, **QUICK)
    with pytest.raises(UsageError, match="`backbone` was pruned already"):
        mhacut.prune_(model, "backbone.layer", images=images, **QUICK)
    with pytest.raises(CheckpointError, match="expected a folder of save_pruned"):
        mhacut.load_pruned(file)
    other = build(TinyBackbone, 32, 4)
    with pytest.raises(CheckpointError, match=r"does not fit this TinyBackbone: .* 4 heads"):
        mhacut.apply_pruned(other, file)
    assert other.layer[0].attention.head_dim == 8  # as it was
    with pytest.raises(CheckpointError, match="expected 1 TinyBackbone in the Linear, found none"):
        mhacut.apply_pruned(nn.Linear(2, 2), file)
    with pytest.raises(CheckpointError, match="not found"):
        mhacut.load_pruned(tmp_path / "other")
    with pytest.raises(UsageError, match="expected 1 pruned submodule, found none"):
        mhacut.save_pruned(before, file)
    with pytest.raises(UsageError, match="expected a name ending in"):
        mhacut.save_pruned(model, tmp_path / "folder")
    with pytest.raises(CheckpointError, match="apply_pruned"):
        mhacut.load_model(file)


@pytest.mark.slow
def test_batches_come_in_all_forms(images):
    plans, batches, called = [], images.split(8), build()
    loader = iter(batches)
    for model, given in (
        (build(), batches),
        (build(), [{"pixel_values": batch} for batch in batches]),
        (build(), [(batch, "labels") for batch in batches]),
        (called, lambda: called(next(loader))),
    ):
        model.train()
        plans.append(mhacut.prune_(model, "backbone", images=given, **QUICK).plan)
        assert model.training
    assert plans.count(plans[0]) == 4


@pytest.mark.parametrize(("calls", "runs"), [(1, 1), (2, 3)])
def test_runs_end_at_a_submodule_that_is_called_once(calls, runs, images):
    """With 8 of 24 images a batch, what follows the submodule runs once unless it is called again."""
    model, read = build(), []
    model.head.register_forward_hook(lambda *_: read.append(1))
    whole = model.forward
    model.forward = lambda batch: [whole(batch)["masks"] for _ in range(calls)]
    mhacut.prune_(model, "backbone", images=images.split(8), **QUICK)
    assert len(read) == calls * runs


def test_runs_that_end_early_leave_no_forward_replaced(images):
    """transformers 4 collects hidden states by functions in place of ``forward``, without ``finally``."""
    model = build()
    layer, whole = model.backbone.layer[0], model.forward

    def forward(batch):
        own = layer.forward
        layer.forward = lambda *args, **named: own(*args, **named)
        output = whole(batch)
        del layer.forward
        return output

    model.forward = forward
    mhacut.prune_(model, "backbone", images=images.split(8), **QUICK)
    assert "forward" not in vars(layer)


class Reading(nn.Module):
    def __init__(self, method="forward", **options):
        super().__init__()
        args = {"depth": 3, "embed_dim": 32, "num_heads": 2, "patch_size": 4, "img_size": 32}
        self.vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="", **args)
        self.method, self.options = method, options

    def forward(self, x):
        features = getattr(self.vit, self.method)(x, **self.options)
        return {"masks": features if isinstance(features, torch.Tensor) else torch.cat(list(features))}


def reading_two_layers():
    return Reading("get_intermediate_layers", n=2, norm=True)


@pytest.mark.slow
def test_tokens_of_a_timm_model_are_merged_and_copied_back(tmp_path):
    model = build(reading_two_layers)
    images = neighbours_alike()
    dense = masks_of(model, images)
    result = mhacut.prune_(model, images=images.split(6), effort="fast", flops="40%")
    assert (result.part, result.preserved) == ("vit", ("output[0]", "output[1]"))
    assert sum(result.plan.tokens.merged) > 0
    assert " tokens merged and copied back, divergence of output" in repr(result)
    masks = masks_of(model, images)
    assert masks.shape == dense.shape
    assert 0 < relative(masks, dense) < 1
    mhacut.save_pruned(model, tmp_path / "vit.safetensors")
    fresh = build(reading_two_layers)
    mhacut.apply_pruned(fresh, tmp_path / "vit.safetensors")
    assert torch.equal(masks_of(fresh, images), masks)
    if not torch.__version__.startswith("2.7"):  # which exports no module that was copied
        exported = torch.export.export(model, (images[:2],), strict=False).module()
        assert relative(exported(images[:2])["masks"].detach(), masks_of(model, images[:2])) < 1e-5
    model.train()(images)["masks"].sum().backward()
    assert all(p.grad is not None for p in model.vit.blocks[0].parameters())


def neighbours_alike():
    noise = torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return noise.repeat_interleave(8, 2).repeat_interleave(8, 3)


def test_logits_without_a_name_need_the_number_of_classes(images):
    recorder = Recorder()
    model = build(lambda: nn.Sequential(timm.create_model("vit_tiny_patch16_224", depth=2, img_size=16)))
    result = mhacut.prune_(model, "", images=images, reporter=recorder, **QUICK)
    assert result.metric == "features"
    assert any("For logits, set num_classes of the model" in message for message in recorder.messages)
    model = build(lambda: nn.Sequential(timm.create_model("vit_tiny_patch16_224", depth=2, img_size=16)))
    model.num_classes = 1000
    assert mhacut.prune_(model, "", images=images, **QUICK).metric == "answers"


@pytest.mark.slow
def test_a_classifier_that_merges_tokens_is_healed():
    args = {"depth": 3, "embed_dim": 32, "num_heads": 2, "patch_size": 4, "img_size": 32, "num_classes": 5}
    model = build(lambda: timm.create_model("vit_tiny_patch16_224", **args))
    images = neighbours_alike()
    result = mhacut.prune_(model, "", images=images.split(6), effort="fast", flops="40%", heal_steps=2)
    assert sum(result.plan.tokens.merged) > 0


@pytest.mark.slow
def test_tokens_are_tuned_on_as_they_are(images):
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=16, num_classes=3)
    model = build(nn.Sequential, vit)
    tuned = {"tuning_steps": 2, "batch_size": 4} | QUICK | {"flops": "20%"}
    result = mhacut.prune_(model, "0.blocks", images=images, **tuned)
    assert result.flops_after <= 0.2 * result.flops_before
    assert model[0].blocks[0].mlp.fc1.out_features < 4 * 192
    assert result.divergence > 0.05  # else nothing is tuned


@pytest.mark.slow
def test_a_classifier_keeps_its_answers(images):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit, self.classifier = TinyBackbone(), nn.Linear(32, 5)

        def forward(self, pixel_values):
            return {"logits": self.classifier(self.vit(pixel_values)["pooler_output"])}

    for part, kept in (("", "logits"), ("vit", "pooler_output")):
        result = mhacut.prune_(build(Classifier), part, images=images, **QUICK)
        assert result.preserved == (kept,)


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "size"), [(Segmenter, 16), (Reading, 32)])
def test_a_loss_says_what_must_stay(cls, size):
    model = build(cls)
    images = torch.randn(96, 3, size, size, generator=torch.Generator().manual_seed(0))
    dense = masks_of(model, images)[..., :1]
    result = mhacut.prune_(model, images=images, loss=lambda out: out["masks"][..., :1], **QUICK)
    assert result.preserved == ("loss",)
    error = float((masks_of(model, images)[..., :1] - dense).square().mean() / dense.var())
    assert 0.5 * error < result.divergence < 2 * error


@pytest.mark.parametrize("loss", [lambda out: out["masks"].sum(), lambda out: out["masks"].detach()])
def test_a_loss_that_gives_no_tensor_of_images_is_refused(loss, images):
    with pytest.raises(UsageError, match=r"loss: expected a tensor \[images, ...\] that depends"):
        mhacut.prune_(build(), images=images, loss=loss, **QUICK)


def test_half_precision_stays(images):
    model = build().bfloat16()
    mhacut.prune_(model, images=images.bfloat16(), **QUICK)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert masks_of(model, images.bfloat16()).isfinite().all()


class Two(Segmenter):
    def __init__(self):
        super().__init__()
        self.teacher = TinyBackbone()


@pytest.mark.parametrize(
    ("model", "part", "error", "message"),
    [
        (Segmenter, "backbon", UsageError, "part='backbon': Segmenter has no such submodule; .*`backbone`"),
        (Segmenter, "neck", UnsupportedModelError, "`neck`: Conv2d has no attention layer"),
        (
            Segmenter,
            "backbone.layer.0.attention",
            UnsupportedModelError,
            "is a single layer. Choose a `part`",
        ),
        (Two, None, UsageError, "2 vision transformers found: `backbone`, `teacher`; choose 1 as `part`"),
        (Two, "teacher", DataError, "images: `teacher` was not called"),
        (lambda: nn.Conv2d(3, 3, 1), None, UnsupportedModelError, "the model: Conv2d has no attention layer"),
    ],
)
def test_what_cannot_be_pruned_is_said_in_one_sentence(model, part, error, message, images):
    with pytest.raises(error, match=message):
        mhacut.prune_(build(model), part, images=images, **QUICK)


def test_budgets_out_of_reach_change_nothing(images):
    model = build()
    before = copy.deepcopy(model.state_dict())
    for flops, message in (("1%", "out of reach"), ("100%", "nothing to prune")):
        with pytest.raises(BudgetError, match=message):
            mhacut.prune_(model, images=images, effort="fast", flops=flops)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_mask_that_is_alike_for_all_images_is_that_of_use(images):
    class Masked(Segmenter):
        seen = torch.tensor([9])

        def forward(self, pixel_values):
            mask = (torch.arange(17) < self.seen[:, None])[:, None, None].expand(len(pixel_values), 1, 17, 17)
            return {"masks": self.backbone(pixel_values, attention_mask=mask)["last_hidden_state"]}

    model = build(Masked)
    dense = masks_of(model, images)
    mhacut.prune_(model, images=images.split(8), effort="fast", flops="90%")
    unmasked = model.backbone(images)["last_hidden_state"].detach()
    assert relative(masks_of(model, images), dense) < relative(unmasked, dense)
    Masked.seen = torch.arange(1, 9)
    with pytest.raises(UnsupportedModelError, match=r"found a second, \[8, 1, 17, 17\]"):
        mhacut.prune_(build(Masked), images=images.split(8), **QUICK)


class Tower(nn.Module):
    """The output of the last block is not read, as in LLaVA. A map has 0 channels, as in smp."""

    def __init__(self):
        super().__init__()
        self.vit = timm.create_model(
            "vit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=2, patch_size=8, img_size=32
        )

    def forward(self, x):
        x = self.vit.patch_embed(x)
        levels = [block(x) for block in self.vit.blocks]
        return {"empty": x[..., :0], "level": levels[0]}


def test_a_layer_whose_output_is_not_read_stays():
    torch.manual_seed(0)
    model, x = Tower().eval(), torch.randn(16, 3, 32, 32)
    result = mhacut.prune_(model, "", images=x.split(8), flops="70%", effort="fast")
    assert result.flops_after <= 0.7 * result.flops_before
    assert {unit.layer.split(".")[2] for unit in result.plan if not unit.keeps_all} == {"0"}
