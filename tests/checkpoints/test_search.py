"""Files that state no model: which architecture they are recognised as, and with which arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from mhacut.checkpoint.build import shapes_of, without_values
from mhacut.checkpoint.fingerprints import read_table
from mhacut.checkpoint.header import FileHeader, TensorInfo
from mhacut.checkpoint.identify import identify_dense
from mhacut.checkpoint.identity import ModelHints
from mhacut.checkpoint.infer import infer_from_shapes
from mhacut.checkpoint.load import read_model
from mhacut.checkpoint.search import computes_the_same, search
from mhacut.commands.models import architectures
from mhacut.errors import CheckpointError
from tools.generate_fingerprints import prunable_fingerprints

VIT = "vit_tiny_patch16_224"
DIGITS = {"in_chans": 1, "num_classes": 10, "img_size": 32, "patch_size": 4, "depth": 6}
AVERAGED = {"class_token": False, "global_pool": "avg"}


def build(name, **args):
    with without_values():
        return timm.create_model(name, **args)


def tensors_of(model):
    return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}


def header_of(model) -> FileHeader:
    return FileHeader(Path("model.safetensors"), "safetensors", tensors_of(model))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        (VIT, {"num_classes": 10}),
        (VIT, {"num_classes": 0}),
        (VIT, DIGITS),
        (VIT, {**AVERAGED, "depth": 3, "num_classes": 4}),
        (VIT, {"init_values": 1e-5, "qkv_bias": False, "depth": 3, "num_classes": 4}),
        ("deit_tiny_distilled_patch16_224", {"num_classes": 7, "in_chans": 1, "depth": 2}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 112, "num_classes": 3}),
        ("swin_tiny_patch4_window7_224", {"num_classes": 5, "in_chans": 4}),
        pytest.param("beit_base_patch16_224", {"num_classes": 5, "depth": 2}, marks=pytest.mark.slow),
        pytest.param("convit_tiny", {"num_classes": 5}, marks=pytest.mark.slow),
        pytest.param("levit_128s", {"num_classes": 5}, marks=pytest.mark.slow),
    ],
)
def test_a_file_is_recognised_without_a_flag(name, args):
    model = build(name, **args)
    found = search(header_of(model), {})
    assert found.identity.architecture == name
    assert args.items() <= {**found.identity.model_args}.items()
    assert shapes_of(found.skeleton) == shapes_of(model)
    assert computes_the_same(model, found.skeleton)
    assert {note.split()[0] for note in found.notes if ", from " in note} == {*found.inferred}


def test_models_that_were_trained_on_other_images_are_named():
    note = search(header_of(build(VIT, num_classes=10)), {}).notes[-1]
    assert note.startswith("tensors also fit deit_tiny_patch16_224, trained on other images. To choose, give")


def test_of_a_width_that_timm_lacks_the_name_and_the_heads_are_asked_for():
    header = header_of(build(VIT, embed_dim=48, num_heads=3, depth=2, patch_size=8, img_size=32))
    with pytest.raises(CheckpointError) as error:
        search(header, {})
    message = str(error.value)
    assert "no prunable timm model has exactly these 32 tensors. For timm's plain ViT" in message
    assert "model='vit_tiny_patch16_224' model_args={'num_heads': 'N'}" in message
    with pytest.raises(CheckpointError, match=r"expected \[192, 3, 8, 8\], found \[48, 3, 8, 8\]"):
        identify_dense(header, ModelHints(VIT))
    found = infer_from_shapes(VIT, {"num_heads": 3}, {}, header.tensors)
    assert found.identity.model_args["embed_dim"] == 48


def test_of_a_cnn_the_kind_of_model_is_named():
    header = header_of(timm.create_model("resnet18", num_classes=5))
    with pytest.raises(CheckpointError, match="no tensor belongs to attention"):
        search(header, {})


@pytest.mark.slow
def test_of_what_fits_no_model_the_nearest_is_named():
    model = build("swin_tiny_patch4_window7_224", num_classes=5, img_size=256, window_size=8)
    with pytest.raises(CheckpointError, match=r"The nearest are swin_\w+"):
        search(header_of(model), {})


def test_models_that_compute_different_things_are_asked_about():
    model = build("vit_base_patch32_clip_224", num_classes=10)
    with pytest.raises(CheckpointError) as error:
        search(header_of(model), {})
    message = str(error.value)
    assert "models with different outputs fit the names and shapes" in message
    assert "vit_base_patch32_clip_quickgelu_224" in message


@pytest.mark.slow
@pytest.mark.parametrize("side", [224, 384])
def test_of_models_that_only_take_other_images_one_is_chosen(tmp_path, side):
    torch.manual_seed(0)
    model = timm.create_model(f"xcit_nano_12_p16_{side}", num_classes=5).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    found = read_model(tmp_path / "model.safetensors")
    assert found.identity.architecture == "xcit_nano_12_p16_224"
    for size in (224, 384):
        images = torch.randn(1, 3, size, size)
        with torch.no_grad():
            assert torch.equal(found.model(images), model(images))
    chosen = read_model(tmp_path / "model.safetensors", model="xcit_nano_12_p16_384")
    assert chosen.input_size == (3, 384, 384)


@pytest.mark.parametrize(
    ("args", "given"),
    [
        (DIGITS, {}),
        ({"embed_dim": 48, "num_heads": 3, "depth": 1}, {"num_heads": 3}),
        ({"mlp_ratio": 2.5, "depth": 1}, {}),
        ({"mlp_ratio": 1 / 3, "depth": 1}, {}),
        ({"qkv_bias": False, "init_values": 1e-5, "pre_norm": True, "depth": 1}, {}),
        ({**AVERAGED, "depth": 1, "img_size": 64}, {}),
        ({"global_pool": "avg", "depth": 1}, {}),
        ({"reg_tokens": 2, "depth": 1, "img_size": 48}, {}),
    ],
)
def test_arguments_beside_the_model_are_inferred(args, given):
    model = build(VIT, **args)
    found = infer_from_shapes(VIT, given, {}, tensors_of(model))
    assert shapes_of(found.skeleton) == shapes_of(model)
    assert computes_the_same(model, found.skeleton)
    assert {*found.identity.model_args} == {*given, *found.inferred}


def names_of(groups):
    return [name for group in groups.values() for names in group.values() for name in names]


def test_the_table_is_of_architectures_that_timm_has():
    version, groups = read_table()
    names = names_of(groups)
    assert len(names) == len(set(names)) > 700
    if version == timm.__version__:
        assert set(names) <= set(timm.list_models())


@pytest.mark.slow
def test_every_prunable_architecture_has_a_fingerprint():
    """Of a module of timm without any that is prunable, one architecture stands for all."""
    (version, groups), catalogued = read_table(), architectures()
    listed = set(names_of(groups))
    modules = {name: timm.models.model_entrypoint(name).__module__ for name in catalogued}
    catalogued = [
        name for name in catalogued if modules[name].startswith(("timm.", "mhacut."))
    ]  # not of tests
    of_listed = {modules[name] for name in listed & set(catalogued)}
    first = {modules[name]: name for name in reversed(catalogued)}.values()
    new = [
        name for name in catalogued if name not in listed and (modules[name] in of_listed or name in first)
    ]
    wrong = {*prunable_fingerprints(new), *(listed - set(catalogued))}
    says = f"{sorted(wrong)}: python tests/tools/generate_fingerprints.py"
    if version != timm.__version__ and not any(name.startswith("flatten_") for name in wrong):
        pytest.skip(f"the table is of timm {version}; of {timm.__version__} it lacks {says}")
    assert not wrong, says
