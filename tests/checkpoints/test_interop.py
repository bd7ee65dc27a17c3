"""Checkpoints of other libraries give in timm what they give in their own library."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import mhacut
from mhacut.checkpoint.files import read_file_header
from mhacut.checkpoint.foreign.config import Config, image_side, transformers_cfg
from mhacut.checkpoint.foreign.family import mlp_ratio
from mhacut.checkpoint.foreign.recognise import FAMILIES, recognise
from mhacut.checkpoint.load import read_model
from mhacut.data import Preprocessing

pytestmark = pytest.mark.slow
SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 50,
    "image_size": 32,
    "patch_size": 8,
}
SWIN = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 12,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
DINO = {name: value for name, value in SMALL.items() if name != "intermediate_size"}


@pytest.fixture(scope="module")
def transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers", reason="pip install 'mhacut[interop]'")


@torch.no_grad()
def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not name.endswith("coords_table"):
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(1 + noise.abs())
            elif tensor.dim() > 1:
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
            else:
                tensor.add_(noise * 0.3)
    return model.eval()


def logits(output: Any) -> torch.Tensor:
    return output.logits


def class_token(output: Any) -> torch.Tensor:
    return output.last_hidden_state[:, 0]


def pooled(output: Any) -> torch.Tensor:
    return output.pooler_output


@dataclass(frozen=True)
class Case:
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    answer: Callable[[Any], torch.Tensor] = logits
    load: dict[str, Any] = field(default_factory=dict)


CASES = {
    "vit": Case("ViTForImageClassification", {**SMALL, "num_labels": 7}),
    "vit-features": Case("ViTModel", {**SMALL, "qkv_bias": False}, class_token),
    "vit-eps": Case("ViTModel", {**SMALL, "layer_norm_eps": 1e-5, "hidden_act": "relu"}, class_token),
    "deit": Case("DeiTForImageClassification", {**SMALL, "num_labels": 7}),
    "deit-distilled": Case("DeiTForImageClassificationWithTeacher", {**SMALL, "num_labels": 7}),
    "beit": Case(
        "BeitForImageClassification", {**SMALL, "num_labels": 7, "use_relative_position_bias": True}
    ),
    "dinov2": Case("Dinov2Model", DINO, class_token),
    "dinov2-gated": Case("Dinov2Model", {**DINO, "use_swiglu_ffn": True}, class_token),
    "dinov2-headless": Case(
        "Dinov2ForImageClassification", {**DINO, "num_labels": 7}, class_token, {"num_classes": 0}
    ),
    "dinov2-registers": Case("Dinov2WithRegistersModel", DINO, class_token),
    "dinov3": Case("DINOv3ViTModel", {**SMALL, "num_register_tokens": 4}, class_token),
    "dinov3-gated": Case(
        "DINOv3ViTModel", {**SMALL, "use_gated_mlp": True, "hidden_act": "silu"}, class_token
    ),
    "clip": Case("CLIPVisionModel", SMALL, pooled),
    "clip-classifier": Case("CLIPForImageClassification", {"vision_config": SMALL, "num_labels": 7}),
    "siglip": Case("SiglipVisionModel", SMALL, pooled),
    "siglip-classifier": Case("SiglipForImageClassification", {"vision_config": SMALL, "num_labels": 7}),
    "swin": Case("SwinForImageClassification", {**SWIN, "num_labels": 7}),
    "swin-features": Case("SwinModel", {**SWIN, "window_size": 8, "qkv_bias": False}, pooled),
    "swinv2": Case("Swinv2ForImageClassification", {**SWIN, "num_labels": 7}),
    "swinv2-pretrained-window": Case(
        "Swinv2Model", {**SWIN, "window_size": 8, "pretrained_window_sizes": [4, 4]}, pooled
    ),
    "pvt_v2": Case(
        "PvtV2ForImageClassification",
        {
            "image_size": 64,
            "depths": [1, 2, 1, 1],
            "hidden_sizes": [8, 16, 24, 32],
            "num_attention_heads": [1, 2, 3, 4],
            "num_labels": 7,
        },
    ),
}


@pytest.fixture(scope="module")
def built(transformers, tmp_path_factory):
    def build(case: Case):
        cls = getattr(transformers, case.model)
        model = randomised(cls(cls.config_class(**case.options)))
        folder = tmp_path_factory.mktemp("folder")
        model.save_pretrained(folder)
        return folder, model

    return build


@pytest.mark.parametrize("name", CASES)
def test_transformers_answers_are_timms(built, name):
    case = CASES[name]
    folder, original = built(case)
    original_names = original.state_dict()  # since version 5, files have other names than modules
    side = case.options.get("image_size", 32)
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        if "headless" in name:
            original = original.base_model
        expected = case.answer(original(pixel_values=images))
    converted = mhacut.load_model(folder, **case.load)
    with torch.no_grad():
        found = converted(images)
    assert expected.std() > 0.05
    torch.save(original_names, folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "kept.safetensors")
    with torch.no_grad():
        assert torch.equal(mhacut.load_model(folder, **case.load)(images), found)
    (folder / "kept.safetensors").rename(folder / "model.safetensors")
    headless = case.load.get("num_classes") == 0
    family = recognise(read_file_header(folder), headless=headless).family
    for file in ("pytorch_model.bin", "model.safetensors"):
        assert recognise(read_file_header(folder / file), headless=headless).family is family
    assert torch.allclose(found, expected, rtol=0, atol=1e-4), (found - expected).abs().max()


MODEL_TYPES = [name for one in FAMILIES.values() for name in one.model_types if not name.startswith("timm")]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_a_configuration_leaves_out_has_the_default_of_transformers(transformers, model_type):
    family = next(family for family in FAMILIES.values() if model_type in family.model_types)
    full = transformers.AutoConfig.for_model(model_type).to_dict()
    if "vision_config" in full:
        full = full["vision_config"] | {"model_type": model_type}
    stated = Config(json.loads(json.dumps(full)), "here")
    sparse = Config({"model_type": model_type}, "here")
    assert family.build(sparse, {}) == family.build(stated, {})


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "CLIP", "DINOv3ViT"])
def test_images_are_prepared_as_by_transformers(transformers, kind):
    processor = getattr(transformers, f"{kind}ImageProcessor")()
    stated = Config(json.loads(processor.to_json_string()), "here")
    coarse = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((400, 300), Image.Resampling.BICUBIC)
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    size = (3, image_side(stated), image_side(stated))
    found = Preprocessing.resolve({"input_size": size, **transformers_cfg(stated, 3)}, size).transform()(
        picture
    )
    assert (found - expected).abs().mean() < 0.01


def test_a_model_of_two_towers_gives_its_image_tower(built):
    tower = {
        "num_hidden_layers": 1,
        "vocab_size": 40,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    options = {"vision_config": SMALL, "text_config": {**SMALL, **tower}, "projection_dim": 12}
    folder, original = built(Case("CLIPModel", options))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = original.visual_projection(original.vision_model(pixel_values=images).pooler_output)
        found = mhacut.load_model(folder)(images)
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)
    assert "left out: the text tower" in read_model(folder).notes[0]


def test_patches_of_siglip_2_become_a_square_image(built):
    options = {name: value for name, value in SMALL.items() if name != "image_size"} | {"num_patches": 16}
    folder, original = built(Case("Siglip2VisionModel", options))
    images = torch.randn(2, 3, 32, 32)
    grid = images.reshape(2, 3, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 192)
    with torch.no_grad():
        expected = original(
            pixel_values=grid,
            pixel_attention_mask=torch.ones(2, 16, dtype=torch.long),
            spatial_shapes=torch.tensor([[4, 4], [4, 4]]),
        ).pooler_output
        found = mhacut.load_model(folder)(images)
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)


def torchvision_models():
    from torchvision.models import vision_transformer as vit
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    v2 = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    return {
        "vit": lambda: vit.VisionTransformer(32, 8, 2, 3, 24, 50, num_classes=7),
        "swin": lambda: SwinTransformer([4, 4], 12, [2, 2], [2, 4], [4, 4], num_classes=7),
        "swinv2": lambda: SwinTransformer([4, 4], 12, [2, 2], [2, 4], [4, 4], num_classes=7, **v2),
    }


SWIN_SIZES = {"img_size": 32, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
SIZES: dict[str, dict[str, Any]] = {
    "vit": {
        "model": "vit_base_patch16_224",
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "patch_size": 8,
        "mlp_ratio": mlp_ratio(50, 24),
    },
    "swin": {"model": "swin_tiny_patch4_window7_224", **SWIN_SIZES},
    "swinv2": {"model": "swinv2_tiny_window8_256", **SWIN_SIZES},
}


@pytest.mark.parametrize("name", ["vit", "swin", "swinv2"])
def test_torchvisions_answers_are_timms(name, tmp_path):
    original = randomised(torchvision_models()[name]())
    torch.save(original.state_dict(), tmp_path / "model.pth")
    model = mhacut.load_model(tmp_path / "model.pth", **SIZES[name])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, found = original(images), model(images)
    assert expected.std() > 0.05
    assert torch.allclose(found, expected, rtol=0, atol=1e-4), (found - expected).abs().max()
    assert model.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


TOWER = {"image_size": 32, "layers": 2, "width": 24, "patch_size": 8, "head_width": 8, "mlp_ratio": 2.0}
TEXTS = {"context_length": 8, "vocab_size": 40, "width": 24, "heads": 3, "layers": 1}
TRUNK = {
    "timm_model_name": "vit_tiny_patch16_224",
    "timm_pool": "token",
    "timm_proj": "linear",
    "image_size": 224,
}


@pytest.mark.parametrize(
    ("vision", "quick"),
    [(TOWER, True), (TOWER | {"ls_init_value": 0.1}, False), (TRUNK, False)],
    ids=["quickgelu", "layer-scale", "trunk"],
)
def test_open_clips_answers_are_timms(vision, quick, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        open_clip = pytest.importorskip("open_clip", reason="pip install 'mhacut[interop]'")
    model_cfg = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": TEXTS}
    original = randomised(open_clip.CLIP(**model_cfg, quick_gelu=quick))
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "resize_mode": "squash"}
    config = {"model_cfg": model_cfg | {"quick_gelu": quick}, "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(original.state_dict(), tmp_path / "open_clip_model.safetensors")
    side = vision["image_size"]
    checkpoint, images = read_model(tmp_path), torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = original.visual.trunk(images) if vision is TRUNK else original.encode_image(images)
        found = checkpoint.model(images)
    assert torch.allclose(found, expected, rtol=0, atol=1e-4), (found - expected).abs().max()
    assert checkpoint.identity.pretrained_cfg["std"] == [0.4, 0.5, 0.6]
    assert checkpoint.identity.pretrained_cfg["crop_mode"] == "squash"
