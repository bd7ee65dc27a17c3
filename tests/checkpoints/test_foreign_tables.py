"""Tables by which checkpoints of other libraries become models of timm, tried without any file."""

from __future__ import annotations

import pytest
import torch

from mhacut.checkpoint.foreign.config import Config, image_side, transformers_cfg
from mhacut.checkpoint.foreign.family import Family
from mhacut.checkpoint.foreign.recognise import FAMILIES as FAMILY
from mhacut.errors import CheckpointError

BEIT, SWIN, VIT = (FAMILY[f"{name} of transformers"] for name in ("BEiT", "Swin", "ViT"))


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({"size": 224, "resample": 3}, {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic"}),
        ({"size": 256, "crop_size": 224, "do_center_crop": True}, {"crop_pct": 0.875, "crop_mode": "squash"}),
        (
            {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
            {"crop_pct": 0.875, "crop_mode": "center"},
        ),
        (
            {"size": 224, "crop_size": 224, "feature_extractor_type": "CLIPFeatureExtractor"},
            {"crop_pct": 1.0, "crop_mode": "center"},
        ),
        (
            {"image_mean": [1, 1, 1], "image_std": [2, 2, 2], "rescale_factor": 2 / 255},
            {"mean": [0.5] * 3, "std": [1.0] * 3},
        ),
        (
            {"image_mean": [127.5] * 3, "image_std": [127.5] * 3, "do_rescale": False},
            {"mean": [0.5] * 3, "std": [0.5] * 3},
        ),
        (
            {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "do_rescale": False},
            {"mean": [0.5] * 3, "std": [0.25] * 3},
        ),
        (
            {"image_mean": [1, 1, 1], "image_std": [2, 2, 2], "do_normalize": False},
            {"mean": [0.0] * 3, "std": [1.0] * 3},
        ),
    ],
)
def test_preprocessing_is_timms_words_for_it(processor, expected):
    found = transformers_cfg(Config(processor, "here"), 3)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    "processor", [{"image_mean": "0.5", "image_std": [1, 1, 1]}, {"size": -3}, {"do_rescale": "yes"}]
)
def test_preprocessing_is_not_trusted(processor):
    with pytest.raises(CheckpointError, match=r"^here: "):
        transformers_cfg(Config(processor, "here"), 3)


def test_windows_that_do_not_tile_the_image_are_refused():
    config = Config({"image_size": 64, "depths": [2, 2], "num_heads": [2, 4], "window_size": 7}, "here")
    with pytest.raises(CheckpointError, match=r"the 16x16 grid of stage 0 is no multiple of it"):
        SWIN.build(config, {})


@pytest.mark.parametrize(
    ("title", "config", "architecture"),
    [
        ("ViT", {}, "vit_base_patch16_224"),
        ("ViT", {"layer_norm_eps": 1e-5}, "vit_base_patch16_clip_224"),
        ("BEiT", {"image_size": 384}, "beit_base_patch16_384"),
        ("BEiT", {"image_size": 256}, "beit_base_patch16_224"),  # timm has none for 256 pixels
        ("DINOv2", {"num_hidden_layers": 7}, "vit_base_patch14_dinov2"),
        ("DINOv3", {}, "vit_small_patch16_dinov3_qkvb"),
        ("Swin", {}, "swin_tiny_patch4_window7_224"),
        ("PVTv2", {}, "pvt_v2_b0"),
    ],
)
def test_a_configuration_names_the_nearest_model_of_timm(title, config, architecture):
    assert FAMILY[f"{title} of transformers"].build(Config(config, "here"), {}).architecture == architecture


@pytest.mark.parametrize(
    ("title", "name", "expected"),
    [
        ("BEiT of transformers", "data2vec_vision.layernorm.weight", "norm.weight"),
        ("ViT of torchvision", "heads.weight", "head.weight"),
        ("ViT of torchvision", "heads.head.bias", "head.bias"),
        ("PVTv2 of its authors", "block2.0.mlp.dwconv.dwconv.bias", "stages.1.blocks.0.mlp.dwconv.bias"),
        ("Swin of torchvision", "features.3.1.mlp.0.bias", "layers.1.blocks.1.mlp.fc1.bias"),
    ],
)
def test_tensors_have_other_names_in_timm(title, name, expected):
    assert FAMILY[title].targets(name) == (expected,)


def test_biases_of_swin_are_joined_and_those_of_swin_v2_are_not():
    tensors = {
        f"swin.encoder.layers.0.blocks.1.attention.self.{part}.bias": torch.full((2,), float(value))
        for value, part in enumerate(("query", "key", "value"))
    }
    joined = {name: tensor.tolist() for name, tensor in SWIN.convert(tensors).items()}
    assert joined == {"layers.0.blocks.1.attn.qkv.bias": [0, 0, 1, 1, 2, 2]}
    query = "encoder.layers.0.blocks.1.attention.self.query.bias"
    assert FAMILY["Swin V2 of transformers"].targets(query) == ("layers.0.blocks.1.attn.q_bias",)


def test_a_classifier_without_a_place_is_refused_or_left_out():
    dinov2, tensors = FAMILY["DINOv2 of transformers"], {"classifier.bias": torch.ones(1)}
    with pytest.raises(CheckpointError, match="reads the class token and the mean of the patches"):
        dinov2.convert(tensors)
    assert dinov2.convert(tensors, headless=True) == {}


def test_images_that_are_not_square_have_no_side():
    sizes = {"height": 200, "width": 200}, {"height": 200, "width": 300}, {}
    assert [image_side(Config({"size": size}, "here")) for size in sizes] == [200, None, None]


def test_names_with_several_numbers_and_parts():
    table = Family(
        "x",
        {"a.*.b.*.q": ("x.*.y.*.qk#0",), "a.*.b.*.k": ("x.*.y.*.qk#1",), "c.w": ("d.w", "", "e.w")},
        prefixes=("m.",),
        left_out={"text": "the text"},
    )
    one, none = torch.ones(1), torch.zeros(2)
    found = table.convert(
        {"m.a.1.b.2.k.w": one, "m.a.1.b.2.q.w": none, "m.text.w": one, "c.w": torch.arange(3)}
    )
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "x.1.y.2.qk.w": [0, 0, 1],
        "d.w": [0],
        "e.w": [2],
    }
    assert table.described_as_left_out({"m.text.w": 1}) == ["the text"]
    with pytest.raises(CheckpointError, match=r"2 tensors map to timm's 'x.1.y.2.z.w'"):
        Family("x", {"a": ("x.1.y.2.z",), "b": ("x.1.y.2.z",)}).convert({"a.w": one, "b.w": one})
