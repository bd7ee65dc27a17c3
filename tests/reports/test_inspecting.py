"""``mhacut.inspect``: what is read, what heads are judged by, what is shown."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.cli import document_of, run, succeed
from helpers.files import cut_into_file
from helpers.models import build, slow_except
from helpers.plans import random_plan
from mhacut.checkpoint.load import open_checkpoint, read_model
from mhacut.commands.inspect import inspect
from mhacut.errors import CheckpointError, UsageError
from mhacut.inspection.layers import BY_WEIGHTS, inspect_model
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.flops import measure_flops_by_module, weightless
from properties.cases import CASES, VITS


@pytest.fixture
def images(few_digits):
    return few_digits / "train" / "0"


@pytest.mark.parametrize("case", VITS.values(), ids=VITS.keys())
def test_flops_without_weights_are_flops(case):
    model = build(case)
    size = (3, case.args["img_size"], case.args["img_size"])
    counted = measure_flops_by_module(weightless(model.to("meta")), size)
    assert counted == measure_flops_by_module(build(case), size)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", slow_except({"vit"}, ["vit", "swin", "flatten"]))
def test_layer_by_layer_is_as_in_the_whole_model(slim_of, name):
    path = slim_of(name)
    assert inspect_model(open_checkpoint(path)) == inspect_model(read_model(path))


def test_shapes_alone_need_no_weights(tiny_vit, tmp_path):
    """Of a file whose numbers are all NaN only the header is worth anything."""
    tensors = {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(tiny_vit.path).items()}
    save_file(tensors, tmp_path / "nan.safetensors")
    found = inspect(tmp_path / "nan.safetensors", shapes=True, **tiny_vit.options).inspection
    whole = inspect(tiny_vit.path, **tiny_vit.options).inspection
    assert (found.flops, found.parameters, found.judged_by) == (whole.flops, whole.parameters, None)
    assert [layer.flops for layer in found.layers] == [layer.flops for layer in whole.layers]
    assert not any(unit.heads for layer in found.layers for unit in layer.units.values())
    with pytest.raises(CheckpointError, match="hold NaN or infinite values: 'cls_token'"):
        inspect(tmp_path / "nan.safetensors", **tiny_vit.options)


def test_images_judge_by_what_they_are(tiny_vit, images):
    found = inspect(tiny_vit.path, data_dir=images, **tiny_vit.options).inspection
    assert found.judged_by == "3 of 3 images under " + images.name + "/ (without labels)"
    by_weights = inspect(tiny_vit.path, **tiny_vit.options).inspection
    assert by_weights.judged_by == BY_WEIGHTS
    assert found.layers[0].units["v"].heads != by_weights.layers[0].units["v"].heads
    assert found.flops == by_weights.flops


def test_a_repeated_channel_is_seen(tiny_vit, tmp_path):
    """A head whose value channels all do the same has rank 1 and similarity 1."""
    tensors = load_file(tiny_vit.path)
    weight = tensors["blocks.1.attn.qkv.weight"]  # 3 heads of 16: v of head 1 lies at 96 + 16
    weight[112:128] = weight[112]
    save_file(tensors, tmp_path / "a.safetensors")
    found = inspect(tmp_path / "a.safetensors", **tiny_vit.options).inspection.layers[2]
    head = found.units["v"].heads[1]
    assert head.rank99 == 1
    assert head.similarity == pytest.approx(1.0, abs=1e-6)
    assert found.units["v"].heads[0].rank99 > 10


def test_the_verdict_says_how_much_is_of_use(tiny_vit):
    found = inspect(tiny_vit.path, **tiny_vit.options)
    layers = [layer for layer in found.inspection.layers if layer.heads]
    ranks = [head.rank99 for layer in layers for head in layer.units["qk"].heads]
    share = sum(ranks) / (16 * len(ranks))
    assert f"; 99 % of the energy is in {100 * share:.0f} % of qk, " in found.verdict
    assert found.verdict.endswith("(by weights alone)")


def test_slim_files_say_what_was_kept_and_removed(slim_of):
    document = document_of("inspect", slim_of("vit"))
    assert document["slim"]
    units = [unit for layer in document["layers"] for unit in layer["units"].values()]
    assert any(unit["heads"] for unit in units)
    cut = [unit for layer in document["layers"] for unit in layer["units"].values() if unit["kept"]]
    assert cut
    for unit in cut:
        for kept in unit["kept"]:
            assert len(kept) == unit["now"]
            assert set(kept) < set(range(unit["dense"]))
    shown = run("inspect", slim_of("vit"), "--heads").stdout
    assert re.search(r"blocks\.0\.attn, qk of head 0: kept (principal )?channels \d.*; removed ", shown)


def test_one_layer_head_by_head(tiny_vit):
    result = run("inspect", *tiny_vit.flags, "--layer", "*.1.attn")
    assert re.findall(r"^  head (\d) +16 ", result.stdout, re.MULTILINE) == ["0", "1", "2"]
    assert "blocks.0" not in result.stdout
    document = document_of("inspect", *tiny_vit.flags, "--layer", "*.1.attn")
    (layer,) = document["layers"]
    assert len(layer["units"]["v"]["heads"]) == 3


@pytest.mark.parametrize("sort", ["params", "qk", "rank"])
def test_sorted_layers_fall(slim_of, sort):
    path = slim_of("flatten")
    found = inspect(path, sort=sort)
    assert {layer.name for layer in found.chosen} == {layer.name for layer in found.inspection.layers}

    def number(layer):
        heads = [head.rank99 for unit in layer.units.values() for head in unit.heads]
        if sort == "rank":
            return sum(heads) / len(heads) if heads else 0
        return layer.parameters if sort == "params" else layer.units["qk"].now if "qk" in layer.units else 0

    numbers = [number(layer) for layer in found.chosen]
    assert numbers == sorted(numbers, reverse=True)
    assert len(set(numbers)) > 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"shapes": True, "data_dir": "d"},
            "shapes=True reads the file header, but the model must run for data_dir",
        ),
        ({"shapes": True, "sort": "rank"}, "sort='rank' reads the model's weights; leave out shapes=True"),
        ({"sort": "size"}, "sort='size': expected one of layer, flops"),
        ({"layer": "blocks.7.*"}, r"'blocks.7.\*': no layer has this name. The model has blocks.0.attn"),
    ],
)
def test_what_cannot_be_is_refused(tiny_vit, given, message):
    with pytest.raises(UsageError, match=message):
        inspect(tiny_vit.path, **tiny_vit.options, **given)


def test_heads_that_go_as_one_are_a_single_row(tmp_path, images):
    """All q/k of multi-query attention, beside v of every head; of a slim file, which names what it kept."""
    case, page = CASES["attention2d.MultiQueryAttention2d, model"], tmp_path / "page.html"
    model = build(case)
    plan, _ = random_plan(find_prunable_layers(model), seed=0)
    slim = cut_into_file(model, plan, tmp_path / "slim.safetensors", case)
    result = succeed("inspect", slim, "--data-dir", images, "--heads", "--html", page, "-q")
    layers = [layer for layer in inspect_model(read_model(slim)).layers if layer.heads]
    assert [layer.heads for layer in layers] == [3, 2]
    assert [layer.units["qk"].head_count for layer in layers] == [1, 1]
    assert any(layer.units["qk"].kept is not None for layer in layers)
    first = result.stdout.partition("blocks.1.0.attn")[2].partition("blocks.1.1")[0]
    assert re.findall(r"^  head (\d+) +\d", first, re.MULTILINE) == ["0", "1", "2"]
