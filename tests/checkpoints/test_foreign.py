"""Checkpoints of other libraries, written here by name: folders, bare files, refusals."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from safetensors.torch import save_file

import mhacut
from helpers.checkpoints import ARGS, NAME, refusal, tiny
from mhacut.checkpoint.foreign.family import mlp_ratio
from mhacut.checkpoint.load import open_checkpoint, read_model
from mhacut.checkpoint.preprocessing import provenance, resolve_preprocessing
from mhacut.errors import MhacutError
from mhacut.options.base import PreprocessingOptions

CONFIG = {
    "model_type": "vit",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 50,
    "image_size": 32,
    "patch_size": 8,
    "id2label": {"0": "cat", "1": "dog", "2": "owl"},
}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_normalize": True,
    "do_rescale": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.2, 0.1],
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": 32, "width": 32},
}


def vit_tensors(dtype=torch.float32):
    shapes = {
        "vit.embeddings.cls_token": (1, 1, 24),
        "vit.embeddings.position_embeddings": (1, 17, 24),
        "vit.embeddings.patch_embeddings.projection.weight": (24, 3, 8, 8),
        "vit.embeddings.patch_embeddings.projection.bias": (24,),
        "vit.pooler.dense.weight": (24, 24),
        "classifier.weight": (3, 24),
        "classifier.bias": (3,),
    }
    linear = {"attention.attention.query": (24, 24), "attention.attention.key": (24, 24)}
    linear |= {"attention.attention.value": (24, 24), "attention.output.dense": (24, 24)}
    linear |= {"intermediate.dense": (50, 24), "output.dense": (24, 50)}
    for block in (0, 1):
        for name, shape in linear.items():
            shapes[f"vit.encoder.layer.{block}.{name}.weight"] = shape
            shapes[f"vit.encoder.layer.{block}.{name}.bias"] = shape[:1]
    norms = ["encoder.layer.0.layernorm_", "encoder.layer.1.layernorm_"]
    for norm in [f"{prefix}{place}" for prefix in norms for place in ("before", "after")] + ["layernorm"]:
        shapes |= {f"vit.{norm}.weight": (24,), f"vit.{norm}.bias": (24,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path):
    def write(config=None, tensors=None, processor=PROCESSOR, shards=1):
        path = tmp_path / "vit"
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(CONFIG | (config or {})))
        if processor is not None:
            (path / "preprocessor_config.json").write_text(json.dumps(processor))
        tensors = vit_tensors() if tensors is None else tensors
        names = [f"model-{n:05d}-of-{shards:05d}.safetensors" for n in range(1, shards + 1)]
        for index, name in enumerate(names if shards > 1 else ["model.safetensors"]):
            save_file(dict(list(tensors.items())[index::shards]), path / name)
        return path

    return write


def test_a_folder_of_transformers_is_a_timm_model(folder):
    tensors = vit_tensors(torch.bfloat16)
    checkpoint = read_model(folder(tensors=tensors))
    state = checkpoint.model.state_dict()
    joined = [
        tensors[f"vit.encoder.layer.1.attention.attention.{part}.weight"]
        for part in ("query", "key", "value")
    ]
    assert torch.equal(state["blocks.1.attn.qkv.weight"], torch.cat(joined).float())
    assert torch.equal(state["head.weight"], tensors["classifier.weight"].float())
    assert set(checkpoint.dtypes.values()) == {torch.bfloat16}
    identity = checkpoint.identity
    assert identity.architecture == "vit_base_patch16_224"
    assert identity.model_args["num_heads"] == 3
    assert identity.model_args["num_classes"] == 3
    cfg = identity.pretrained_cfg
    assert cfg["label_names"] == ["cat", "dog", "owl"]
    assert (cfg["mean"], cfg["std"]) == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.1])
    assert (cfg["interpolation"], cfg["crop_pct"], cfg["crop_mode"]) == ("bilinear", 1.0, "squash")
    assert checkpoint.notes[0] == "converted from ViT of transformers; left out: the pooler"


def test_the_processor_of_images_and_texts_counts_too(folder):
    path = folder(processor=None)
    assert "no preprocessor_config.json" in read_model(path).notes[0]
    (path / "processor_config.json").write_text(json.dumps({"image_processor": PROCESSOR, "tokenizer": {}}))
    assert read_model(path).identity.pretrained_cfg["mean"] == [0.5, 0.4, 0.3]


@pytest.mark.parametrize(
    ("side", "crop"), [(32, "crop 1 center"), (64, "crop 1 center"), (72, "crop 0.9 center")]
)
def test_without_a_processor_images_are_cropped_as_those_of_bare_files(folder, side, crop):
    tensors = vit_tensors()
    tensors["vit.embeddings.position_embeddings"] = torch.zeros(1, (side // 8) ** 2 + 1, 24)
    opened = open_checkpoint(folder({"image_size": side}, tensors, processor=None))
    stated = PreprocessingOptions()
    assert crop in provenance(opened, stated).describe(resolve_preprocessing(opened, stated))


def test_no_configuration_ends_in_an_internal_error(folder):
    path = folder()
    for file, document in {"config.json": CONFIG, "preprocessor_config.json": PROCESSOR}.items():
        for name in document:
            for value in [None, True, -1, 10**9, "a" * 200, [0, 0], {"a": 1}]:
                (path / file).write_text(json.dumps(document | {name: value}))
                with contextlib.suppress(MhacutError):
                    assert open_checkpoint(path).skeleton is not None
        (path / file).write_text(json.dumps(document))


def test_shards_are_read_as_one_file(folder):
    whole = mhacut.load_model(folder()).state_dict()
    path = folder(shards=3)
    (path / "model.safetensors").unlink()
    checkpoint = read_model(path)
    parts = checkpoint.model.state_dict()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert len(checkpoint.sha256) == 64
    assert len(mhacut.inspect(path).inspection.layers) == 4
    (path / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is missing" in refusal(path)


def test_shards_without_a_configuration_are_read_as_a_bare_file(tmp_path):
    state = tiny().state_dict()
    for number, part in enumerate((list(state)[:9], list(state)[9:]), 1):
        save_file({name: state[name] for name in part}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    found = read_model(tmp_path, model=NAME, model_args=ARGS)
    assert all(torch.equal(found.model.state_dict()[name], state[name]) for name in state)
    assert found.stem == tmp_path.name


def test_a_bare_file_is_recognised_by_its_names(folder):
    path = folder() / "model.safetensors"
    args = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8, "mlp_ratio": mlp_ratio(50, 24)}
    found = read_model(path, model="vit_base_patch16_224", model_args=args)
    expected = mhacut.load_model(path.parent).state_dict()
    state = found.model.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert found.identity.model_args["img_size"] == 32
    assert "(converted from ViT of transformers). Give the folder with its configuration" in refusal(path)


def test_the_classifier_can_be_left_out(folder):
    model = mhacut.load_model(folder(), num_classes=0)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 24)
    assert "'head.bias' expected [5], found [3]" in refusal(folder(), num_classes=5)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "segformer"}, "'segformer' cannot be converted to timm. Supported: vit"),
        ({"hidden_size": "24"}, "hidden_size: expected a whole number from 1, or two equal ones"),
        ({"hidden_size": 10**30}, "timm cannot build"),
        ({"num_hidden_layers": 60000}, "is far too large for the tensors"),
        ({"image_size": [32, 16]}, "image_size: expected a whole number from 1, or two equal"),
        ({"image_size": 60000}, "at most 4194304 pixels"),
        ({"qkv_bias": "no"}, "qkv_bias: expected true or false"),
        ({"hidden_act": {"a": 1}}, "hidden_act: expected a text, found dict"),
        ({"hidden_act": "mish"}, "hidden_act: expected one of gelu"),
        ({"layer_norm_eps": 1e-3}, "layer_norm_eps 0.001 cannot be converted"),
        ({"num_attention_heads": 5}, "timm cannot build"),
        ({"num_channels": 4}, "image_mean: expected a list of 4 numbers"),
    ],
)
def test_configurations_are_not_trusted(folder, config, says):
    assert says in refusal(folder(config))


def test_tensors_that_do_not_belong_to_the_model_are_named(folder):
    tensors = vit_tensors()
    extra = folder(tensors=tensors | {"decode_head.weight": torch.zeros(2)})
    assert (
        "ViT of transformers: found 1 tensors that the model does not have: 'decode_head.weight'"
        in refusal(extra)
    )
    del tensors["vit.encoder.layer.0.attention.attention.key.weight"]
    said = refusal(folder(tensors=tensors))
    assert "'blocks.0.attn.qkv.weight' expected [72, 24], found [48, 24]" in said
    tensors["vit.encoder.layer.0.attention.attention.key.weight"] = torch.zeros(24, 7)
    assert "contradict each other" in refusal(folder(tensors=tensors))
    missing = vit_tensors()
    del missing["vit.layernorm.weight"]
    assert "1 missing, 0 unexpected" in refusal(folder(tensors=missing))


OPEN_CLIP = {
    "visual.class_embedding": (24,),
    "visual.positional_embedding": (17, 24),
    "visual.proj": (24, 12),
    "visual.conv1.weight": (24, 3, 8, 8),
    "visual.transformer.resblocks.0.attn.in_proj_weight": (72, 24),
    "visual.transformer.resblocks.0.attn.in_proj_bias": (72,),
    "visual.transformer.resblocks.0.attn.out_proj.weight": (24, 24),
    "visual.transformer.resblocks.0.attn.out_proj.bias": (24,),
    "visual.transformer.resblocks.0.mlp.c_fc.weight": (96, 24),
    "visual.transformer.resblocks.0.mlp.c_fc.bias": (96,),
    "visual.transformer.resblocks.0.mlp.c_proj.weight": (24, 96),
    "visual.transformer.resblocks.0.mlp.c_proj.bias": (24,),
    "transformer.resblocks.0.ln_1.weight": (8,),
    "logit_scale": (),
} | {
    f"visual.{norm}.{kind}": (24,)
    for norm in ("ln_pre", "ln_post", "transformer.resblocks.0.ln_1", "transformer.resblocks.0.ln_2")
    for kind in ("weight", "bias")
}
TOWER = {"image_size": 32, "layers": 1, "width": 24, "patch_size": 8, "head_width": 8}


def open_clip_folder(path, tower=None, tensors=None, preprocess=None):
    path.mkdir(exist_ok=True)
    config = {"model_cfg": {"vision_cfg": TOWER | (tower or {})}, "preprocess_cfg": preprocess or {}}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    tensors = tensors or {name: torch.ones(shape) for name, shape in OPEN_CLIP.items()}
    save_file(tensors, path / "open_clip_model.safetensors")
    return path


def test_a_folder_of_open_clip_is_its_image_tower(tmp_path):
    preprocess = {"mean": [0.1, 0.2, 0.3], "resize_mode": "longest", "interpolation": "bilinear"}
    checkpoint = read_model(open_clip_folder(tmp_path, preprocess=preprocess))
    assert checkpoint.identity.architecture == "vit_base_patch16_clip_224"
    assert checkpoint.model(torch.randn(1, 3, 32, 32)).shape == (1, 12)
    cfg = checkpoint.identity.pretrained_cfg
    assert (cfg["mean"], cfg["crop_mode"], cfg["interpolation"]) == ([0.1, 0.2, 0.3], "border", "bilinear")
    assert "left out: the text tower" in checkpoint.notes[0]


def test_the_configuration_beside_the_weights_counts(tmp_path):
    path = open_clip_folder(tmp_path)
    (path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "clip"}))
    assert read_model(path).identity.model_args["depth"] == 1


@pytest.mark.parametrize(
    ("tower", "says"),
    [
        ({"layers": [3, 4, 6, 3]}, "found a CLIP ResNet"),
        ({"pool_type": "avg"}, "pool_type 'avg' cannot be converted"),
        ({"norm_kwargs": {"eps": 1}}, "norm_kwargs: not supported by timm"),
        ({"width": None, "head_width": 0}, "head_width: expected a whole number"),
    ],
)
def test_towers_of_open_clip_that_timm_has_not_are_refused(tmp_path, tower, says):
    assert says in refusal(open_clip_folder(tmp_path, tower))


def test_a_tower_of_another_kind_is_refused(tmp_path):
    assert "unsupported image tower" in refusal(
        open_clip_folder(tmp_path, tensors={"visual.layer1.0.weight": torch.ones(1)})
    )
    trunk = {"visual.trunk.a.weight": torch.ones(1)}
    names = {"timm_model_name": "os.system"}
    assert "timm has no model 'os'" in refusal(open_clip_folder(tmp_path, names, trunk))
    names = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "abs_attn"}
    assert "timm_pool: expected one of avg, token, map" in refusal(open_clip_folder(tmp_path, names, trunk))


def test_a_model_of_timm_behind_a_prefix_is_that_model(tmp_path):
    model = tiny()
    config = {"model_type": "timm_wrapper", "architecture": "vit_tiny_patch16_224", "model_args": ARGS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(
        {f"timm_model.{name}": tensor for name, tensor in model.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    found = mhacut.load_model(tmp_path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": "os.system"}))
    assert "architecture: timm has no model 'os'" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": {"checkpoint_path": "x"}}))
    assert "'checkpoint_path' is not allowed" in refusal(tmp_path)
