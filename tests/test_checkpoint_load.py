"""Recognising and opening checkpoints: which model, which classes, which dtypes, and what does not fit."""

from __future__ import annotations

import json
import math
import random

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config
from timm.models import save_for_hf
from torch import nn

from mhacut.checkpoint import identify
from mhacut.checkpoint.build import allocate
from mhacut.checkpoint.identify import completed_cfg
from mhacut.checkpoint.load import load_model, open_checkpoint, read_model
from mhacut.checkpoint.record import METADATA_KEY, SlimRecord
from mhacut.checkpoint.write import write_slim
from mhacut.errors import CheckpointError
from mhacut.plan import Plan, UnitPlan
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.slice import cut

NAME = "vit_tiny_patch16_224"
ARGS = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


def tiny(name=NAME, **changes):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**ARGS, "num_classes": 10, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def save(model, path, **changes):
    save_file({**model.state_dict(), **changes}, path)
    return path


@pytest.fixture
def dense(tmp_path):
    model = tiny()
    return model, save(model, tmp_path / "dense.safetensors")


def random_plan(model, widths, seed=0) -> Plan:
    choose = random.Random(seed)
    units = []
    for unit in find_prunable_layers(model).units():
        kept = tuple(
            tuple(sorted(choose.sample(range(unit.width), widths[unit.kind]))) for _ in range(unit.heads)
        )
        units.append(UnitPlan(*unit.key, unit.width, kept))
    return Plan(tuple(units))


def make_slim(source, path, widths=None, **read_args):
    """A slim file made from ``source``; returns the slim model and its record."""
    loaded = read_model(source, **read_args)
    plan = random_plan(loaded.model, widths or {"qk": 5, "v": 11, "hidden": 77})
    preprocessing = resolve_data_config({}, model=loaded.model)
    cut(loaded.model, plan)
    record = SlimRecord(loaded.identity, plan, preprocessing, ({"command": "prune"},))
    write_slim(path, loaded.model, record, dtypes=loaded.dtypes, overwrite=False, input_path=loaded.path)
    return loaded.model, record


def refusal(source, **read_args) -> str:
    with pytest.raises(CheckpointError) as error:
        read_model(source, **read_args)
    return str(error.value)


def test_a_dense_file_with_its_model_named(dense):
    model, path = dense
    loaded = read_model(path, model=NAME, model_args=ARGS)
    with torch.no_grad():
        assert torch.equal(loaded.model(IMAGES), model(IMAGES))
    assert not loaded.model.training
    assert loaded.identity.architecture == NAME
    assert loaded.identity.model_args == {**ARGS, "num_classes": 10}
    assert loaded.identity.pretrained_cfg["input_size"] == [3, 224, 224]  # of timm's weights
    assert (loaded.record, loaded.stem, loaded.path) == (None, "dense", path)
    assert set(loaded.dtypes.values()) == {torch.float32}
    assert "num_classes 10, from the shape of head.weight" in loaded.notes


def test_opening_a_model_leaves_the_seed_alone(dense):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    read_model(dense[1], model=NAME, model_args=ARGS)
    assert torch.equal(torch.rand(3), expected)


def test_img_size_is_read_from_a_square_pos_embed(dense):
    _, path = dense
    args = {key: value for key, value in ARGS.items() if key != "img_size"}
    loaded = read_model(path, model=NAME, model_args=args)
    assert loaded.identity.model_args["img_size"] == 32
    assert "img_size 32, from the shape of pos_embed" in loaded.notes
    for use_test_size in (False, True):
        seen = resolve_data_config({}, model=loaded.model, use_test_size=use_test_size)
        # the crop of the architecture's 224-pixel weights says nothing of 32 pixels
        assert (seen["input_size"], seen["crop_pct"]) == ((3, 32, 32), 1.0)


def test_a_timm_folder(tmp_path):
    model = tiny(global_pool="avg")
    save_for_hf(model, tmp_path / "folder", model_args={**ARGS, "global_pool": "avg"})
    loaded = read_model(tmp_path / "folder")
    with torch.no_grad():
        assert torch.equal(loaded.model(IMAGES), model(IMAGES))
    assert loaded.stem == "folder"
    assert f"architecture {NAME}, from config.json" in loaded.notes
    assert "config.json says vit_tiny_patch16_224, model says deit" in refusal(
        tmp_path / "folder", model="deit_tiny_patch16_224"
    )


@pytest.mark.parametrize(
    ("stated", "crop"),
    [
        ({"input_size": [3, 32, 32], "num_classes": 10}, None),
        ({"num_classes": 10}, 0.9),
        ({"input_size": [3, 224, 224]}, 0.9),
        ({"input_size": [3, 32, 32], "crop_pct": 0.8, "mean": [0.1, 0.2, 0.3]}, 0.8),
    ],
)
def test_what_a_config_leaves_out_is_the_architectures_own(tmp_path, stated, crop):
    model = tiny()
    save_for_hf(model, tmp_path / "folder", model_args=ARGS)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    config["pretrained_cfg"] = stated
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    loaded = read_model(tmp_path / "folder")
    with torch.no_grad():
        assert torch.equal(loaded.model(IMAGES), model(IMAGES))
    cfg = loaded.identity.pretrained_cfg
    assert cfg["classifier"] == "head"
    assert cfg["mean"] == stated.get("mean", [0.5] * 3)
    # the crop of one size says nothing of another
    assert completed_cfg(NAME, stated).get("crop_pct") == crop
    # the weights are not timm's: neither are their license and origin
    assert completed_cfg(NAME, stated).keys().isdisjoint({"license", "origin_url", "tag", "architecture"})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "vit_tiny_patch16_225"}, "did you mean vit_tiny_patch16_224"),
        ({"architecture": "os.system"}, "timm has no model"),
        ({"architecture": None}, "expected timm's config with an architecture"),
        ({"model_args": {**ARGS, "depth": 10**6}}, "out of all proportion to the tensors in it"),
        ({"model_args": {**ARGS, "embed_dim": 999_999}}, "out of all proportion to the tensors in it"),
        ({"model_args": {**ARGS, "embed_dim": 10**9}}, "numbers may reach 1000000"),
        ({"model_args": {**ARGS, "img_size": 30_000}}, "'img_size': at most 4194304 pixels (2048x2048)"),
        ({"pretrained_cfg": {"input_size": [3, 30_000, 30_000]}}, "'input_size': at most 4194304 pixels"),
        ({"pretrained_cfg": {"input_size": [3, 32]}}, "'input_size': expected channels, height, width"),
        (
            {"pretrained_cfg": {"std": [0, 0, 0]}},
            "pytorch_model.bin: pretrained_cfg: std [0, 0, 0]: expected 3",
        ),
        ({"pretrained_cfg": {"std": 7}}, "pytorch_model.bin: pretrained_cfg: "),
        ({"pretrained_cfg": {"mean": "abc"}}, "pytorch_model.bin: pretrained_cfg: "),
        ({"pretrained_cfg": {"input_size": [3, 32, 32], "crop_pct": 9}}, "pretrained_cfg: crop_pct 9"),
        ({"pretrained_cfg": {"input_size": [3, 32, 32], "crop_pct": "x"}}, "pretrained_cfg: preprocessing:"),
        ({"model_args": {**ARGS, "checkpoint_path": "/x"}}, "'checkpoint_path' does not describe a model"),
        ({"model_args": {**ARGS, "block_fn": "os.system"}}, "timm cannot build"),
        ({"model_args": {**ARGS, "patch_size": 0}}, "timm cannot build"),
    ],
)
def test_a_config_that_lies_is_refused(tmp_path, changes, says):
    folder = tmp_path / "folder"
    save_for_hf(tiny(), folder, model_args=ARGS)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    assert says in refusal(folder)


@pytest.mark.parametrize(
    ("name", "changes", "classes"),
    [
        ("deit_tiny_distilled_patch16_224", {}, 10),
        ("deit_tiny_distilled_patch16_224", {"num_classes": 0}, 0),
        ("vit_base_patch16_siglip_224", {}, 10),
        ("vit_base_patch16_siglip_224", {"num_classes": 0}, 0),
        ("vit_small_patch14_reg4_dinov2", {}, 10),
    ],
)
def test_classes_are_read_from_the_classifier(tmp_path, name, changes, classes):
    model = tiny(name, **changes)
    path = save(model, tmp_path / "model.safetensors")
    loaded = read_model(path, model=name, model_args=ARGS)
    assert loaded.identity.model_args["num_classes"] == classes
    assert loaded.model.num_classes == classes
    assert any(note.startswith(f"num_classes {classes}, from") for note in loaded.notes)
    with torch.no_grad():
        assert torch.equal(loaded.model(IMAGES), model(IMAGES))


@pytest.fixture(scope="module")
def zeros():
    """Weights of a registered model at full size, cheaply: recognition looks at names and shapes alone."""

    def make(name, **args):
        with torch.device("meta"):
            model = timm.create_model(name, **args)
        return {key: torch.zeros(tensor.shape) for key, tensor in model.state_dict().items()}

    return make


@pytest.mark.parametrize(
    ("name", "args"),
    [
        pytest.param("vit_tiny_r_s16_p8_224", {}, marks=pytest.mark.slow),
        ("pit_ti_224", {}),
        ("deit_tiny_distilled_patch16_224", {"num_classes": 7}),
        pytest.param("deit3_small_patch16_224", {}, marks=pytest.mark.slow),
        pytest.param(
            "vit_small_patch14_reg4_dinov2", {"img_size": 112, "num_classes": 3}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_model_that_only_one_architecture_fits(tmp_path, zeros, name, args):
    path = tmp_path / "model.safetensors"
    save_file(zeros(name, **args), path)
    outline = open_checkpoint(path)
    assert outline.identity.architecture == name
    assert args.items() <= outline.identity.model_args.items()
    assert "from names and shapes" in outline.notes[0]


def test_two_models_that_fit_are_both_named(tmp_path, zeros):
    path = tmp_path / "model.safetensors"
    save_file(zeros("deit_tiny_patch16_224", num_classes=10), path)
    message = refusal(path)
    assert "vit_tiny_patch16_224" in message
    assert "deit_tiny_patch16_224" in message
    assert "give model='NAME'" in message
    assert open_checkpoint(path, model="deit_tiny_patch16_224").identity.model_args == {"num_classes": 10}


def test_what_no_model_fits(dense):
    message = refusal(dense[1])  # depth 2
    assert "the model cannot be identified: no timm model" in message
    assert "give model='NAME' (and model_args={'KEY': 'VALUE'} for" in message


def test_an_unknown_model_name_gets_close_matches(dense):
    message = refusal(dense[1], model="vit_tiny_patch16_242")
    assert "timm has no model 'vit_tiny_patch16_242'" in message
    assert "vit_tiny_patch16_224" in message
    assert "has no pretrained tag 'nope'; it has augreg" in refusal(dense[1], model=f"{NAME}.nope")


def test_a_tag_decides_the_preprocessing(dense):
    loaded = read_model(dense[1], model=f"{NAME}.augreg_in21k", model_args=ARGS)
    assert loaded.identity.architecture == NAME
    assert loaded.identity.pretrained_cfg["tag"] == "augreg_in21k"
    assert loaded.identity.pretrained_cfg["num_classes"] == 10


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"depth": 4}, ["24 missing, 0 unexpected, 0 of another shape", "model_args={'depth': 2}?"]),
        ({"depth": 1}, ["0 missing, 12 unexpected, 0 of another shape"]),
        (
            {"patch_size": 16},
            ["model_args={'patch_size': 8}?", "expected [48, 3, 16, 16], found [48, 3, 8, 8]"],
        ),
        ({"in_chans": 1}, ["model_args={'in_chans': 3}?"]),
        ({"embed_dim": 96}, ["another model, or model_args={'embed_dim': 48, 'num_heads': 'N'}", ", ..."]),
        ({"img_size": 64}, ["1 of another shape", "model_args={'img_size': 'SIDE'} of the file?"]),
        ({"num_classes": 5}, ["2 of another shape", "the head differs: num_classes=10?"]),
        ({"mlp_ratio": 2}, ["only attention or MLP layers differ"]),
        ({"global_pool": "avg"}, ["missing: 'fc_norm.weight', 'fc_norm.bias'"]),
    ],
)
def test_shapes_that_do_not_fit_are_counted_and_hinted_at(dense, changes, says):
    message = refusal(dense[1], model=NAME, model_args={**ARGS, **changes})
    assert "its tensors do not fit vit_tiny_patch16_224" in message
    assert all(text in message for text in says), message


def test_a_file_of_another_library_is_told_so(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({f"encoder.{i}": torch.ones(1) for i in range(2000)}, path)
    message = refusal(path, model=NAME)
    assert "2000 unexpected" in message
    assert "most names are not that model's (it has 'encoder.0', not 'cls_token')" in message
    assert "\n" not in message
    assert len(message) < 400


def test_a_wrong_patch_size_does_not_mislead_about_the_image(dense):
    message = refusal(dense[1], model=NAME, model_args={"embed_dim": 48, "num_heads": 3})
    assert "model_args={'patch_size': 8}?" in message
    assert "model_args={'depth': 2}?" in message
    assert "img_size=" not in message.split("\n")[0]


def test_an_average_pooled_file_hints_at_global_pool(tmp_path):
    path = save(tiny(global_pool="avg"), tmp_path / "x.safetensors")
    assert "model_args={'global_pool': 'avg'}?" in refusal(path, model=NAME, model_args=ARGS)


def test_numbers_that_are_not_finite_are_counted(tmp_path):
    model = tiny()
    model.blocks[1].attn.qkv.weight.data[0, :3] = math.nan
    model.norm.bias.data[1] = math.inf
    message = refusal(save(model, tmp_path / "x.safetensors"), model=NAME, model_args=ARGS)
    assert "2 tensors hold NaN or infinite values" in message
    assert "'blocks.1.attn.qkv.weight' (3 of 6912)" in message
    assert "'norm.bias' (1 of 48)" in message


def test_float64_beyond_float32_is_not_finite(tmp_path):
    model = tiny()
    huge = model.norm.bias.detach().double() + 1e300
    path = save(model, tmp_path / "x.safetensors", **{"norm.bias": huge})
    assert "'norm.bias' (48 of 48)" in refusal(path, model=NAME, model_args=ARGS)


def test_integer_weights_are_refused(tmp_path):
    path = save(
        tiny(),
        tmp_path / "x.safetensors",
        **{"norm.weight": torch.ones(48, dtype=torch.int8), "extra": IMAGES},
    )
    message = refusal(path, model=NAME, model_args=ARGS)
    assert "quantised or complex weights are not supported: 1 tensors" in message
    assert "'norm.weight' (int8)" in message


def test_integer_buffers_are_not_weights(tmp_path, zeros):
    tensors = zeros("resnet18")
    tensors = {
        name: tensor.long() if name.endswith("num_batches_tracked") else tensor
        for name, tensor in tensors.items()
    }
    save_file(tensors, tmp_path / "x.safetensors")
    loaded = read_model(tmp_path / "x.safetensors", model="resnet18")
    assert loaded.dtypes["bn1.num_batches_tracked"] == torch.int64


def test_a_training_checkpoint_says_which_part_was_read(tmp_path):
    model = tiny()
    path = tmp_path / "last.pth.tar"
    ema = {"module." + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": {}, "state_dict_ema": ema, "epoch": 3}, path)
    loaded = read_model(path, model=NAME, model_args=ARGS)
    assert "read the part 'state_dict_ema' of the checkpoint" in loaded.notes
    assert "took the prefix module. or _orig_mod. off the tensor names" in loaded.notes
    with torch.no_grad():
        assert torch.equal(loaded.model(IMAGES), model(IMAGES))


def test_a_suffix_that_lies_is_noted(dense, tmp_path):
    model, path = dense
    loaded = read_model(path.rename(tmp_path / "dense.pth"), model=NAME, model_args=ARGS)
    assert "content is safetensors, in spite of its name" in loaded.notes
    torch.save(model.state_dict(), path)
    loaded = read_model(path, model=NAME, model_args=ARGS)
    assert "content is a torch file, in spite of its name" in loaded.notes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_go_round(tmp_path, dtype):
    model = tiny().to(dtype)
    model.norm.float()  # a mixed file keeps each tensor's own
    path = save(model, tmp_path / "dense.safetensors")
    loaded = read_model(path, model=NAME, model_args=ARGS)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert loaded.dtypes["norm.weight"] == torch.float32
    assert loaded.dtypes["head.weight"] == dtype
    name = str(dtype).removeprefix("torch.")
    assert any(name in note and "computed in float32" in note for note in loaded.notes)
    make_slim(path, tmp_path / "slim.safetensors", model=NAME, model_args=ARGS)
    stored = load_file(tmp_path / "slim.safetensors")
    assert {key: tensor.dtype for key, tensor in stored.items()} == loaded.dtypes
    slim = read_model(tmp_path / "slim.safetensors")
    assert slim.dtypes == loaded.dtypes
    assert all(
        torch.equal(tensor.to(stored[key].dtype), stored[key])
        for key, tensor in slim.model.state_dict().items()
    )


@pytest.mark.parametrize(
    "widths",
    [{"qk": 5, "v": 11, "hidden": 77}, {"qk": 16, "v": 3, "hidden": 192}, {"qk": 8, "v": 8, "hidden": 1}],
)
def test_a_slim_file_goes_round_bit_for_bit(dense, tmp_path, widths):
    path = tmp_path / "slim.safetensors"
    slim, record = make_slim(dense[1], path, widths, model=NAME, model_args=ARGS)
    loaded = read_model(path)
    assert loaded.record == record
    assert loaded.identity == record.identity
    with torch.no_grad():
        assert torch.equal(loaded.model(IMAGES), slim(IMAGES))
    assert {
        unit.key: unit.width for unit in find_prunable_layers(loaded.model).units()
    } == record.plan.widths()


def test_a_slim_model_is_built_and_cut_once(dense, tmp_path, monkeypatch):
    path = tmp_path / "slim.safetensors"
    make_slim(dense[1], path, model=NAME, model_args=ARGS)
    calls = []
    for owner, name in ((timm, "create_model"), (identify, "cut")):
        real = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k)
        )
    opened = open_checkpoint(path)
    assert calls == []
    skeleton = opened.skeleton
    assert not opened.has_weights
    assert opened.model is skeleton
    assert opened.has_weights
    assert calls == ["create_model", "cut"]


def test_memory_is_taken_without_making_two_tensors_of_one():
    with torch.device("meta"):
        tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        tied[1].weight = tied[0].weight
        tied[0].bias.requires_grad_(False)
    allocate(tied)
    assert tied[1].weight is tied[0].weight
    assert {parameter.device.type for parameter in tied.parameters()} == {"cpu"}
    assert [parameter.requires_grad for parameter in tied.parameters()] == [True, False, True]


def test_a_buffer_that_is_in_no_file_is_not_left_without_values():
    module = nn.Module()
    module.register_buffer("index", torch.zeros(2, device="meta"), persistent=False)
    with pytest.raises(AssertionError, match="'index'"):
        allocate(module)


def test_a_slim_model_is_an_ordinary_timm_model(dense, tmp_path):
    make_slim(dense[1], tmp_path / "slim.safetensors", model=NAME, model_args=ARGS)
    model = load_model(tmp_path / "slim.safetensors")
    assert not model.training
    assert resolve_data_config({}, model=model)["input_size"] == (3, 32, 32)
    assert model.forward_features(IMAGES).shape == (2, 17, 48)
    assert model.get_classifier().out_features == 10
    model.reset_classifier(4)
    assert model(IMAGES).shape == (2, 4)


def test_the_preprocessing_of_the_cut_is_what_timm_resolves(dense, tmp_path):
    loaded = read_model(dense[1], model=NAME, model_args=ARGS)
    preprocessing = {
        "input_size": (3, 32, 32),
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "interpolation": "bilinear",
        "crop_pct": 0.5,
        "crop_mode": "squash",
    }
    record = SlimRecord(loaded.identity, Plan(()), preprocessing, ())
    path = tmp_path / "slim.safetensors"
    write_slim(path, loaded.model, record, dtypes={}, overwrite=False, input_path=None)
    for use_test_size in (False, True):
        assert resolve_data_config({}, model=load_model(path), use_test_size=use_test_size) == preprocessing


def test_the_header_alone_tells_widths(dense, tmp_path):
    path = tmp_path / "slim.safetensors"
    _, record = make_slim(dense[1], path, model=NAME, model_args=ARGS)
    header = open_checkpoint(path).header
    assert open_checkpoint(path).record == record
    assert header.shapes["blocks.0.attn.qkv.weight"] == (3 * (5 + 5 + 11), 48)
    assert header.dtypes["blocks.0.attn.qkv.weight"] == torch.float32
    outline = open_checkpoint(path)
    assert {parameter.device.type for parameter in outline.skeleton.parameters()} == {"meta"}


def test_a_slim_file_says_itself_what_it_is(dense, tmp_path):
    path = tmp_path / "slim.safetensors"
    make_slim(dense[1], path, model=NAME, model_args=ARGS)
    assert read_model(path, model=NAME, model_args=ARGS, num_classes=10).record is not None
    message = refusal(path, model="deit_tiny_patch16_224", model_args={"depth": 3}, num_classes=5)
    assert "leave out model='deit_tiny_patch16_224' (it is vit_tiny_patch16_224)" in message
    assert "depth=3 (it has 2), num_classes=5 (it has 10)" in message


def relabel(path, **changes):
    """Change what a slim file states, and nothing else."""
    with torch.no_grad():
        tensors = load_file(path)
    document = json.loads(open_checkpoint(path).header.metadata[METADATA_KEY])
    plan = changes.pop("plan", None)
    document.update(changes)
    if plan is not None:
        document["plan"] = plan(document["plan"])
        document["layers"] = json.loads(
            SlimRecord.from_json(json.dumps({**document, "layers": _layers(document["plan"])})).to_json()
        )["layers"]
    save_file(tensors, path, {METADATA_KEY: json.dumps(document)})


def _layers(units):
    from mhacut.checkpoint.record import layer_widths

    return layer_widths(Plan.from_json(units))


def widened(units):
    """The last unit claims to keep one channel of very many more."""
    *rest, last = units
    return [*rest, {**last, "dense_width": 10**9}]


def one_less(units):
    *rest, last = units
    return [*rest, {**last, "kept": [row[1:] for row in last["kept"]]}]


def elsewhere(units):
    return [{**unit, "layer": unit["layer"].replace("blocks.0", "blocks.7")} for unit in units]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"plan": widened}, "the model has 1 heads of 192 channels, the plan is for 1 of 1000000000"),
        ({"plan": one_less}, "0 missing, 0 unexpected, 3 of another shape\n"),
        ({"plan": elsewhere}, "the model has no unit"),
        ({"plan": lambda units: []}, "metadata states and its tensors disagree"),
        (
            {"architecture": "resnet18", "model_args": {}, "pretrained_cfg": {}},
            "no attention layer mhacut can cut",
        ),
        ({"architecture": "no_such_model"}, "timm has no model 'no_such_model'"),
        ({"model_args": {**ARGS, "num_classes": 11}}, "2 of another shape"),
        ({"model_args": {**ARGS, "depth": 10**6}}, "out of all proportion to the tensors in it"),
        ({"model_args": {**ARGS, "mlp_ratio": 10**6}}, "out of all proportion to the tensors in it"),
        ({"model_args": {**ARGS, "img_size": 2048, "patch_size": 1}}, "out of all proportion"),
        ({"format_version": 2}, "upgrade mhacut"),
    ],
)
def test_metadata_that_does_not_match_the_tensors_is_refused(dense, tmp_path, changes, says, monkeypatch):
    path = tmp_path / "slim.safetensors"
    make_slim(dense[1], path, model=NAME, model_args=ARGS)
    relabel(path, **changes)

    def never(model):
        raise AssertionError("took memory")

    monkeypatch.setattr("mhacut.checkpoint.checkpoint.allocate", never)
    message = refusal(path)
    assert says in message
    assert message.startswith(str(path))


def test_tables_of_positions_for_another_image_size_are_told_as_such(tmp_path):
    args = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2), "window_size": 7, "num_classes": 5}
    name = "swin_tiny_patch4_window7_224"
    path = save(timm.create_model(name, img_size=56, **args), tmp_path / "x.safetensors")
    message = refusal(path, model=name, model_args={**args, "img_size": 32})
    assert "image or window size differs: model_args={'img_size': 'SIDE'} (or window_size)" in message
    assert "For images of another size: img_size, maybe with" in message
    assert "another tool" not in message
    message = refusal(path, model=name, model_args={**args, "img_size": 56, "num_heads": (3, 3)})
    assert "is of 2 heads, expected 3: model_args={'num_heads': 'N'}?" in message


def test_a_file_pruned_by_another_tool_is_refused(tmp_path):
    model = tiny()
    cut(model, random_plan(model, {"qk": 5, "v": 11, "hidden": 77}))
    path = save(model, tmp_path / "x.safetensors")
    message = refusal(path, model=NAME, model_args=ARGS)
    assert "'blocks.0.attn.qkv.weight' expected [144, 48], found [63, 48]" in message
    assert "was it pruned by another tool?" in message


def test_load_model_opens_dense_files_too(dense):
    model, path = dense
    opened = load_model(path, NAME, **ARGS, num_classes=10)
    with torch.no_grad():
        assert torch.equal(opened(IMAGES), model(IMAGES))


def test_timm_weights_offline_are_one_clear_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    message = refusal("timm:vit_tiny_patch16_224")
    assert (
        "timm:vit_tiny_patch16_224: its weights are not in the cache and could not be downloaded" in message
    )
    assert "give a file and model" in message
    assert "\n" not in message


def test_timm_names_are_checked_before_anything_is_fetched(monkeypatch):
    monkeypatch.setattr(timm.models._builder, "load_pretrained", lambda *a, **k: pytest.fail("fetched"))
    assert "did you mean vit_tiny_patch16_224" in refusal("timm:vit_tiny_patch16_22")
    assert "no such pretrained weights; timm has vit_tiny_patch16_224.augreg" in refusal(
        "timm:vit_tiny_patch16_224.x"
    )
    assert "no pretrained weights of this model" in refusal("timm:vit_base_patch16_gap_224")
    assert "names its model already" in refusal("timm:vit_tiny_patch16_224", model=NAME)
    assert "timm cannot build" in refusal("timm:vit_tiny_patch16_224", model_args={"surprise": 1})


def test_timm_weights_from_the_cache(monkeypatch):
    def cached(model, **_):
        torch.nn.init.ones_(model.norm.bias)

    monkeypatch.setattr(timm.models._builder, "load_pretrained", cached)
    loaded = read_model(f"timm:{NAME}.augreg_in21k_ft_in1k", model_args=ARGS)
    assert loaded.model.norm.bias.tolist() == [1.0] * 48
    assert (loaded.stem, loaded.path) == (f"{NAME}.augreg_in21k_ft_in1k", None)
    assert loaded.identity.model_args == {**ARGS, "num_classes": 1000}
    assert len(loaded.sha256) == 64
    assert "one of 10 would be random" in refusal(f"timm:{NAME}", model_args=ARGS, num_classes=10)
