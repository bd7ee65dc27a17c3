"""Tables by which checkpoints of other libraries become models of timm, tried without any file."""

from __future__ import annotations

import pytest
import torch

from mhacut.checkpoint.foreign.config import Config
from mhacut.checkpoint.foreign.convolutional import MOBILEVIT, PVT_V2
from mhacut.checkpoint.foreign.dino import DINOV2, DINOV3
from mhacut.checkpoint.foreign.images import image_side, transformers_cfg
from mhacut.checkpoint.foreign.rename import Renaming
from mhacut.checkpoint.foreign.swin import SWIN, SWINV2
from mhacut.checkpoint.foreign.torchvision import TORCHVISION_VIT
from mhacut.checkpoint.foreign.vit import BEIT, VIT
from mhacut.errors import CheckpointError


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
            {"size": {"shortest_edge": 224}, "crop_size": 224, "image_processor_type": "LevitImageProcessor"},
            {"crop_pct": 0.875, "crop_mode": "center"},
        ),
        (
            {"image_mean": [1, 1, 1], "image_std": [2, 2, 2], "rescale_factor": 2 / 255},
            {"mean": [0.5] * 3, "std": [1.0] * 3},
        ),
        (
            {
                "image_mean": [1, 1, 1],
                "image_std": [2, 2, 2],
                "image_processor_type": "MobileViTImageProcessor",
            },
            {"mean": [0.0] * 3, "std": [1.0] * 3},
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
            {"image_mean": [0] * 3, "image_std": [0.25] * 3, "do_rescale": False},
            {"mean": [0.0] * 3, "std": [0.25] * 3},
        ),
        (
            {"image_mean": [0] * 3, "image_std": [1] * 3, "do_rescale": False},
            {"mean": [0.0] * 3, "std": [1 / 255] * 3},
        ),
        (
            {"do_rescale": False, "do_normalize": False, "rescale_factor": 1 / 255},
            {"mean": [0.0] * 3, "std": [1 / 255] * 3},
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
    "processor",
    [
        {"image_mean": [0.5, 0.5], "image_std": [1, 1, 1]},
        {"image_mean": "0.5", "image_std": [1, 1, 1]},
        {"size": -3},
        {"size": {"shortest_edge": 10**9}},
        {"do_rescale": "yes"},
        {"rescale_factor": [1]},
    ],
)
def test_preprocessing_is_not_trusted(processor):
    with pytest.raises(CheckpointError, match=r"^here: "):
        transformers_cfg(Config(processor, "here"), 3)


def test_windows_that_do_not_tile_the_image_are_refused():
    config = Config({"image_size": 64, "depths": [2, 2], "num_heads": [2, 4], "window_size": 7}, "here")
    with pytest.raises(CheckpointError, match=r"the 16x16 grid of stage 0 is no multiple of it"):
        SWIN.build(config, {})
    assert SWIN.build(Config({}, "here"), {}).architecture == "swin_tiny_patch4_window7_224"


@pytest.mark.parametrize(
    ("family", "config", "architecture"),
    [
        (VIT, {}, "vit_base_patch16_224"),
        (BEIT, {}, "beit_base_patch16_224"),
        (BEIT, {"image_size": 384}, "beit_base_patch16_384"),
        (BEIT, {"image_size": 256}, "beit_base_patch16_224"),  # timm has none for 256 pixels
        (BEIT, {"num_hidden_layers": 7}, "beit_base_patch16_224"),
    ],
)
def test_what_a_configuration_leaves_out_is_that_of_the_base_size(family, config, architecture):
    built = family.build(Config(config, "here"), {})
    assert built.architecture == architecture
    assert (built.args["embed_dim"], built.args["num_heads"], built.args["mlp_ratio"]) == (768, 12, 4)
    assert built.args["depth"] == config.get("num_hidden_layers", 12)
    assert built.args["img_size"] == config.get("image_size", 224)


@pytest.mark.parametrize(
    ("family", "args"),
    [
        (DINOV3, {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}),
        (SWIN, {"img_size": 224, "embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}),
        (PVT_V2, {"embed_dims": [32, 64, 160, 256], "depths": [2, 2, 2, 2], "num_heads": [1, 2, 5, 8]}),
    ],
    ids=["dinov3", "swin", "pvt_v2"],
)
def test_what_a_configuration_leaves_out_is_as_in_transformers(family, args):
    assert family.build(Config({}, "here"), {}).args.items() >= args.items()


def test_the_norms_of_a_vit_may_add_as_much_as_those_of_clip():
    built = VIT.build(Config({"layer_norm_eps": 1e-5}, "here"), {})
    assert (built.architecture, built.args["pre_norm"]) == ("vit_base_patch16_clip_224", False)


@pytest.mark.parametrize(
    ("family", "name", "expected"),
    [
        (BEIT, "beit.layernorm.weight", "norm.weight"),
        (BEIT, "data2vec_vision.layernorm.weight", "norm.weight"),
        (TORCHVISION_VIT, "heads.weight", "head.weight"),
        (TORCHVISION_VIT, "heads.head.bias", "head.bias"),
        (
            MOBILEVIT,
            "mobilevit.encoder.layer.2.downsampling_layer.reduce_1x1.convolution.weight",
            "stages.2.0.conv3_1x1.conv.weight",
        ),
    ],
)
def test_tensors_have_other_names_in_timm(family, name, expected):
    assert family.renaming({}).target(name) == expected


@pytest.mark.parametrize(("registers", "expected"), [(4, "reg_token"), (0, "")])
def test_registers_of_dinov3_are_left_out_where_there_are_none(registers, expected):
    shapes = {"embeddings.register_tokens": (1, registers, 24), "norm.weight": (24,)}
    assert DINOV3.renaming(shapes).target("embeddings.register_tokens") == expected


def test_biases_of_swin_are_joined_and_those_of_swin_v2_are_not():
    tensors = {
        f"encoder.layers.0.blocks.1.attention.self.{part}.bias": torch.full((2,), float(value))
        for value, part in enumerate(("query", "key", "value"))
    }
    joined = SWIN.renaming({}).apply({f"swin.{name}": tensor for name, tensor in tensors.items()})
    assert {name: tensor.tolist() for name, tensor in joined.items()} == {
        "layers.0.blocks.1.attn.qkv.bias": [0, 0, 1, 1, 2, 2]
    }
    del tensors["encoder.layers.0.blocks.1.attention.self.key.bias"]
    found = SWINV2.renaming({}).apply(tensors)
    assert set(found) == {f"layers.0.blocks.1.attn.{part}_bias" for part in ("q", "v")}


def test_the_classifier_of_dinov2_is_refused_or_left_out():
    renaming, tensors = DINOV2.renaming({}), {"classifier.bias": torch.ones(1)}
    with pytest.raises(CheckpointError, match="reads the class token and the mean of the patches"):
        renaming.apply(tensors)
    assert renaming.without_classifier().apply(tensors) == {}


def test_images_that_are_not_square_have_no_side():
    sizes = {"height": 200, "width": 200}, {"height": 200, "width": 300}, {}
    assert [image_side(Config({"size": size}, "here")) for size in sizes] == [200, None, None]


def test_names_with_several_numbers_and_parts():
    table = Renaming(
        {"a.*.b.*.q": "x.*.y.*.qk#0", "a.*.b.*.k": "x.*.y.*.qk#1"}, {"text": "the text"}, prefixes=("m.",)
    )
    found = table.apply(
        {"m.a.1.b.2.k.w": torch.ones(1), "m.a.1.b.2.q.w": torch.zeros(2), "m.text.w": torch.ones(1)}
    )
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"x.1.y.2.qk.w": [0, 0, 1]}
    assert table.what_is_left_out({"m.text.w": 1}) == ["the text"]
    with pytest.raises(CheckpointError, match=r"two tensors would be 'x.1.y.2.z.w'"):
        Renaming({"a": "x.1.y.2.z", "b": "x.1.y.2.z"}).apply({"a.w": torch.ones(1), "b.w": torch.ones(1)})


def test_only_a_classifier_is_waived_with_the_classifier():
    table = Renaming({"a": "b"}, refused={"pool": "no place"}, refused_classifier={"top": "no such head"})
    tensors = {"a.w": torch.ones(1), "top.w": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"'top.w' cannot be converted: no such head"):
        table.apply(tensors)
    assert list(table.without_classifier().apply(tensors)) == ["b.w"]
    with pytest.raises(CheckpointError, match="no place"):
        table.without_classifier().apply({"pool.w": torch.ones(1)})
