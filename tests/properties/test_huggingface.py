"""Vision models as Hugging Face's transformers write them: a cut is exact, and they stay of their classes."""

from __future__ import annotations

import copy
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import mhacut
from helpers.huggingface import SIZES, TinyBackbone
from helpers.models import relative
from helpers.plans import random_plan
from mhacut.plan import Plan
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.mask import masked_tensors, run_with
from mhacut.surgery.slice import cut
from mhacut.surgery.tokens import set_merged

pytestmark = pytest.mark.slow

OLD = find_spec("transformers") is not None and version("transformers").startswith("4.")
STAGES = {"out_features": ["stage1", "stage3"]}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
MODELS = {
    "tiny": (TinyBackbone, {}),
    "vit": ("ViTModel", SIZES),
    "classifier": ("ViTForImageClassification", SIZES),
    "deit": ("DeiTModel", SIZES),
    "dinov2": ("Dinov2Model", SIZES),
    "swiglu": ("Dinov2Model", {**SIZES, "use_swiglu_ffn": True}),
    "registers": ("Dinov2WithRegistersModel", SIZES),
    "dinov3": ("DINOv3ViTModel", SIZES),
    "dinov3_gated": ("DINOv3ViTModel", {**SIZES, "use_gated_mlp": True}),
    "dinov2_backbone": ("Dinov2Backbone", {**SIZES, **STAGES}),
    "dinov3_backbone": ("DINOv3ViTBackbone", {**SIZES, **STAGES}),
    "clip": ("CLIPVisionModel", SIZES),
    "siglip": ("SiglipVisionModel", SIZES),
    "beit": ("BeitModel", {**SIZES, "use_relative_position_bias": True}),
    "swin": ("SwinModel", SWIN),
}

newest = pytest.mark.skipif(OLD, reason="tokens merge in transformers 5")


class First(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        output = self.model(x)
        output = next(iter(output.values()))
        return output if isinstance(output, torch.Tensor) else output[-1]


def build(cls, sizes):
    torch.manual_seed(0)
    if isinstance(cls, str):
        transformers = pytest.importorskip("transformers", reason="pip install 'mhacut[interop]'")
        if OLD and (
            cls.startswith(("ViT", "DeiT", "Beit", "Swin"))
            or "use_swiglu_ffn" in sizes
            or not hasattr(transformers, cls)
        ):
            pytest.skip("takes transformers 5")
        cls = getattr(transformers, cls)
        built = cls(cls.config_class(**sizes))
    else:
        built = cls(**sizes)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return built.eval()


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return First(build(*MODELS[request.param])).requires_grad_(False)


def images_of(model, batch=2):
    size = getattr(getattr(model.model, "config", None), "image_size", 28)
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
def test_masked_equals_sliced(model, equal):
    prunable, x = find_prunable_layers(model), images_of(model)
    plan, scales = random_plan(prunable, 0)
    if equal:  # what prune_ makes of classes with one width
        halves = [unit.keep_first(unit.width // 2) for unit in prunable.units()]
        plan = Plan(tuple(halves))
        scales = {
            each.key: (torch.arange(each.dense_width) < each.width).float().expand(each.heads, -1)
            for each in halves
        }
    masked = run_with(model, masked_tensors(model, prunable, scales), x)
    slim = copy.deepcopy(model)
    cut(slim, plan, scales)
    assert relative(slim(x), masked) < 1e-5
    assert relative(masked, model(x)) > 1e-3
    assert slim.state_dict().keys() == model.state_dict().keys()
    if equal:
        same = {type(a) is type(b) for a, b in zip(slim.modules(), model.modules(), strict=True)}
        assert same == {True} or "DINOv3" in type(model.model).__name__ or OLD
    twice = copy.deepcopy(slim)  # a slim model is found, and cut, like a dense one
    cut(twice, Plan(tuple(unit.keep_first(unit.width) for unit in find_prunable_layers(twice).units())))
    assert relative(twice(x), slim(x)) < 1e-5


def test_a_pruned_model_exports_trains_and_opens_again(model, tmp_path):
    whole = copy.deepcopy(model).requires_grad_(True)
    x = images_of(model, 12)
    result = mhacut.prune_(whole, "model", images=x.split(6), flops="70%", effort="fast", heal_steps=2)
    assert result.flops_after <= 0.7 * result.flops_before
    y = whole(x).detach()
    assert 0 < relative(y, model(x)) < 1
    mhacut.save_pruned(whole, tmp_path / "part.safetensors")
    fresh = copy.deepcopy(model)
    mhacut.apply_pruned(fresh, tmp_path / "part.safetensors")
    assert relative(fresh(x), y) < 1e-5
    exported = torch.export.export(whole, (x[:2],)).module()
    assert relative(exported(x[:2]).detach(), y[:2]) < 1e-5
    whole.train()(x).square().sum().backward()
    assert sum(parameter.grad is not None for parameter in whole.parameters()) > 10


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize(
    ("name", "prefix"),
    [("Dinov2Model", 1), ("Dinov2WithRegistersModel", 5), ("ViTModel", 1), ("SiglipVisionModel", 0)],
)
@newest
def test_merging_layers_compute_what_timms_do(name, prefix, tmp_path):
    model = build(name, {**SIZES, "layer_norm_eps": 1e-6})
    model.save_pretrained(tmp_path)
    vit, x = mhacut.load_model(tmp_path), images_of(First(model))
    for each in (model, vit):
        set_merged(each, (0, 3, 2), unmerge=True)
    output = model(x, output_hidden_states=True)
    assert relative(output.last_hidden_state, vit.forward_features(x)) < 1e-5
    states = vit.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    for found, expected in zip(output.hidden_states[1:], states, strict=True):
        assert relative(found[:, prefix:], expected) < 1e-5
    exported = torch.export.export(model, (x,)).module()
    assert relative(exported(x).last_hidden_state, output.last_hidden_state) < 1e-5
    model.gradient_checkpointing_enable()
    model.train()(x).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".1." in name)


@newest
def test_a_backbone_merges_tokens_and_opens_again(tmp_path):
    sizes = {**SIZES, **STAGES, "image_size": 56}
    model = First(build("Dinov2Backbone", sizes)).requires_grad_(False)
    x = images_of(model, 8)[..., ::28, ::28].repeat_interleave(28, 2).repeat_interleave(28, 3)
    result = mhacut.prune_(model, "model", images=x, flops="40%", effort="fast")  # neighbours are alike
    assert sum(result.plan.tokens.merged)
    assert "tokens merged and copied back, divergence of feature_maps" in repr(result)
    mhacut.save_pruned(model, tmp_path / "part.safetensors")
    fresh = First(build("Dinov2Backbone", sizes)).requires_grad_(False)
    mhacut.apply_pruned(fresh, tmp_path / "part.safetensors")
    assert relative(fresh(x), model(x)) < 1e-5


@newest
@pytest.mark.parametrize("reads", ["class token", "patches beside logits", "class token of the block before"])
def test_tokens_of_a_classifier_are_copied_back_if_its_code_needs_them(reads):
    transformers = pytest.importorskip("transformers", reason="pip install 'mhacut[interop]'")

    class Classifier(transformers.ViTForImageClassification):
        def forward(self, pixel_values, **options):
            if reads == "class token":
                return super().forward(pixel_values, **options)
            output = self.vit(pixel_values, output_hidden_states=True)
            if reads != "patches beside logits":
                return {"logits": self.classifier(output.hidden_states[-2][:, 0])}
            last = output.last_hidden_state
            patches = last[:, 1:].reshape(len(pixel_values), 8, 8, 32)
            return {"logits": self.classifier(last[:, 0]), "patches": patches}

    model = build(Classifier, {"config": transformers.ViTConfig(**SIZES | {"image_size": 56}, num_labels=5)})
    x = images_of(First(model), 12)[..., ::14, ::14].repeat_interleave(14, 2).repeat_interleave(14, 3)
    result = mhacut.prune_(model, "", images=x.split(6), flops="45%", effort="fast", tuning_steps=0)
    assert (result.metric, result.preserved) == ("answers", ("logits",))
    assert sum(result.plan.tokens.merged) > 0
    assert result.plan.tokens.unmerge == (reads != "class token")
    assert model(x)["logits"].shape == (12, 5)  # and code beside the logits runs


@newest
def test_a_depth_model_is_written_as_a_folder_that_opens_by_one_call(tmp_path):
    stages = {"out_features": [f"stage{n}" for n in (1, 2, 3, 4)], "reshape_hidden_states": False}
    transformers = pytest.importorskip("transformers", reason="pip install 'mhacut[interop]'")
    backbone = transformers.Dinov2Config(**SIZES | {"num_hidden_layers": 4, "image_size": 56}, **stages)
    config = transformers.DPTConfig(
        backbone_config=backbone, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16, patch_size=7
    )
    torch.manual_seed(0)
    model = transformers.DPTForDepthEstimation(config).eval().requires_grad_(False)
    x = torch.randn(8, 3, 56, 56)
    result = mhacut.prune_(model, images=x.split(4), flops="50%", effort="fast")
    assert result.part == "backbone"
    depth = model(x).predicted_depth
    mhacut.save_pruned(model, tmp_path / "folder")
    assert (tmp_path / "folder" / "config.json").is_file()
    card = (tmp_path / "folder" / "README.md").read_text()
    assert 'AutoModelForDepthEstimation.from_pretrained("folder", trust_remote_code=True)' in card
    opened = mhacut.load_pruned(tmp_path / "folder")
    assert relative(opened(x).predicted_depth, depth) < 1e-6
    with pytest.raises(mhacut.OutputError, match="exists already"):
        mhacut.save_pruned(model, tmp_path / "folder")
    assert relative(torch.export.export(opened, (x,)).module()(x).predicted_depth.detach(), depth) < 1e-5


@newest
def test_the_image_tower_of_a_clip_is_pruned_and_texts_stay(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install 'mhacut[interop]'")
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.CLIPConfig(text_config=text, vision_config=SIZES, projection_dim=16)
    torch.manual_seed(0)
    clip, x = transformers.CLIPModel(config).eval().requires_grad_(False), torch.randn(32, 3, 28, 28)
    tokens = torch.randint(0, 99, (5, 7))

    def answers():  # zero-shot, by cosine
        out = clip(input_ids=tokens, pixel_values=x)
        return out.logits_per_image, out.text_embeds

    (dense, texts), batches = answers(), iter(x.split(16))
    whole = [unit.keep_first(unit.width) for unit in find_prunable_layers(clip.vision_model).units()]
    cut(clip.vision_model, Plan(tuple(whole)))
    assert relative(answers()[0], dense) < 1e-5

    def run():
        return clip.get_image_features(next(batches)).pooler_output

    def loss(features):
        return nn.functional.normalize(features, dim=-1) @ texts.T * clip.logit_scale.exp()

    result = mhacut.prune_(clip, "vision_model", images=run, flops="70%", effort="fast", loss=loss)
    pruned, after = answers()
    assert torch.equal(after, texts)
    assert 0 < float((pruned - dense).square().mean() / dense.var()) < 4 * result.divergence
    mhacut.save_pruned(clip, tmp_path / "clip")
    clip = mhacut.load_pruned(tmp_path / "clip")
    assert relative(answers()[0], pruned) < 1e-6
