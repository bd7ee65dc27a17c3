"""``mhacut export --format timm``: a folder that timm opens, with all that timm can do to a model."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

import mhacut
from helpers.checkpoints import make_slim
from helpers.cli import run
from helpers.data import write_split
from helpers.files import SLIM, ModelFile, cut_into_file
from helpers.models import ModelCase, slow_but
from helpers.plans import random_plan
from helpers.pruning import prune_quickly
from mhacut.checkpoint.load import read_model
from mhacut.checkpoint.write import write_slim
from mhacut.commands import export as exporting
from mhacut.commands.export import ExportResult
from mhacut.errors import CheckpointError, MhacutError, OutputError, UnsupportedModelError, UsageError
from mhacut.exporting import timm_folder
from mhacut.exporting.timm_code import timm_code
from mhacut.plan import Plan, TokenPlan
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.tokens import apply_tokens


def opened(folder, **arguments):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments).eval()


@pytest.fixture(scope="module")
def exported(slim_of, tmp_path_factory) -> Callable[[str], ExportResult]:
    def export(name: str) -> ExportResult:
        return mhacut.export(slim_of(name), format="timm", output=tmp_path_factory.mktemp(name) / "folder")

    return cache(export)


@pytest.fixture(scope="module")
def folder(exported) -> Path:
    return exported("vit").output


@pytest.mark.parametrize("name", slow_but(SLIM.keys() - {"vit", "flatten"}, SLIM))
def test_timm_opens_it_to_the_same_numbers(name, slim_of, exported):
    result = exported(name)
    assert max(result.difference.values()) < 1e-6
    model, images = mhacut.load_model(slim_of(name)), torch.randn(2, *result.input_size)
    assert torch.equal(opened(result.output)(images), model(images))
    assert list(result.output.parent.iterdir()) == [result.output]
    again = read_model(result.output)
    assert again.record == read_model(slim_of(name)).record
    assert torch.equal(again.model(images), model(images))


ALONE_THEN_WITH_US = """
import sys
sys.modules["mhacut"] = None  # importing it fails
import timm, torch
dense = timm.create_model("local-dir:" + sys.argv[1], pretrained=True)
print(tuple(dense(torch.ones(1, 3, 32, 32)).shape))
del sys.modules["mhacut"]
import mhacut
slim = timm.create_model("local-dir:" + sys.argv[2], pretrained=True).eval()
print(slim(torch.ones(1, 3, 32, 32)).sum().item())
"""


@pytest.mark.slow
def test_fresh_processes_open_dense_folders_without_us_and_slim_ones_with_us(tiny_vit, folder, tmp_path):
    dense, asked = tmp_path / "dense", tiny_vit.options
    mhacut.export(tiny_vit.path, format="timm", output=dense, **asked)
    assert json.loads((dense / "config.json").read_text())["architecture"] == tiny_vit.architecture
    command = [sys.executable, "-c", ALONE_THEN_WITH_US, str(dense), str(folder)]
    shape, logits = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert shape == "(1, 7)"
    expected = opened(folder)(torch.ones(1, 3, 32, 32)).sum().item()
    assert float(logits) == pytest.approx(expected, rel=1e-5)


def test_what_timm_can_do_to_a_model_it_can_do_to_a_slim_one(folder, tmp_path):
    images = torch.randn(2, 3, 32, 32)
    assert opened(folder, num_classes=3)(images).shape == (2, 3)
    assert opened(folder, in_chans=1)(images[:, :1]).shape == (2, 5)
    assert opened(folder, img_size=64)(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    model = opened(folder)
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 32, 32)
    save_for_hf(model, str(tmp_path / "again"), safe_serialization=True)
    assert torch.equal(opened(tmp_path / "again")(images), model(images))


WITHOUT_MHACUT = """
import runpy
import sys

sys.modules["mhacut"] = None
import torch

code, file = sys.argv[1:]
images, expected = torch.load(file)
model = runpy.run_path(code)["build"]()
assert (model(images) - expected).abs().max() <= 1e-6 * expected.abs().max()
model.train()(images).sum().backward()
assert all(parameter.grad is not None for parameter in model.parameters())
"""
DEEP = {"depth": 12, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 4}
MERGED = TokenPlan(merged=(0, 5, 5, *[2] * 8, 0))


@pytest.mark.parametrize(
    ("architecture", "options", "tokens"),
    [
        ("vit_tiny_patch16_224", {}, replace(MERGED, output_tokens=1)),
        ("vit_tiny_patch16_224", {"scale_attn_norm": True}, replace(MERGED, output_tokens=1)),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, MERGED),
        ("deit_tiny_distilled_patch16_224", {}, replace(MERGED, output_tokens=2)),
    ],
)
def test_timm_opens_merging_models_without_mhacut(tmp_path, architecture, options, tokens):
    case = ModelCase(architecture, {**DEEP, **options})
    torch.manual_seed(0)
    model = case.create().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    plans = random_plan(find_prunable_layers(model), seed=0)[0]
    slim = cut_into_file(model, Plan(tuple(plans), tokens), tmp_path / "slim.safetensors", case)
    opened_without_mhacut(slim, tmp_path)


@pytest.mark.parametrize("name", ["vit", "distilled", "swin"])
def test_timm_opens_models_with_fewer_channels_without_mhacut(slim_of, tmp_path, name):
    opened_without_mhacut(slim_of(name), tmp_path)


def opened_without_mhacut(slim, tmp_path):
    code = mhacut.export(slim, format="timm", output=tmp_path / "folder").output / "model.py"
    assert len(code.read_text().splitlines()) <= 200
    model = mhacut.load_model(slim)
    images = torch.randn(2, *read_model(slim).input_size)
    with torch.no_grad():
        torch.save((images, model(images)), tmp_path / "outputs.pt")
    command = [sys.executable, "-c", WITHOUT_MHACUT, str(code), str(tmp_path / "outputs.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_log_names_a_class_that_model_py_lacks(slim_of, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.py").touch()  # of another model
    result = run("export", slim_of("coat"), "--format", "timm", "-o", folder, "--overwrite")
    assert result.exit_code == 0
    assert "model.py is left out, so the folder needs mhacut" in result.stderr
    assert not (folder / "model.py").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"global_pool": "map"}, "AttentionPoolLatent"), ({"dynamic_img_size": True}, "dynamic_img_size")],
)
def test_model_py_refuses_merges_that_it_would_do_otherwise(options, reason):
    case = ModelCase("vit_tiny_patch16_224", {**DEEP, **options})
    model = case.create()
    apply_tokens(model, MERGED)
    with pytest.raises(UnsupportedModelError, match=reason):
        timm_code(model, case.architecture, case.args)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        ("1 / 0", "division by zero"),
        ("torch.nn.Identity()", "refuses 1 images of 3x32x32: .*shape|must match the size"),
        ("timm.create_model('vit_tiny_patch16_224', img_size=32, num_classes=5)", "the original by [^;]*"),
    ],
)
def test_model_py_that_computes_something_else_is_left_out(slim_of, tmp_path, monkeypatch, build, reason):
    code = f"import timm, torch\ndef build():\n    return {build}\n"
    monkeypatch.setattr(timm_folder, "timm_code", lambda *args: code)
    result = run("export", slim_of("vit"), "--format", "timm", "-o", tmp_path / "folder")
    assert result.exit_code == 0
    assert re.search(f"model.py is left out, .*{reason}", result.stderr)
    assert opened(tmp_path / "folder")(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    assert not (tmp_path / "folder" / "model.py").exists()
    assert "model.py" not in (tmp_path / "folder" / "README.md").read_text()


@pytest.mark.slow
def test_a_model_that_was_cut_for_images_of_another_size(tmp_path):
    architecture, args = "swin_tiny_patch4_window7_224", {"depths": (1, 1), "num_heads": (2, 2)}
    args |= {"embed_dim": 24, "dynamic_img_size": True}
    dense = timm.create_model(architecture, num_classes=5, **args)
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    file = ModelFile(tmp_path / "dense.safetensors", architecture, args)
    slim = prune_quickly(file, tmp_path / "slim.safetensors", flops="85%", img_size=96).output
    mhacut.export(slim, format="timm", output=tmp_path / "folder")
    images = torch.randn(1, 3, 96, 96)
    assert torch.equal(opened(tmp_path / "folder")(images), mhacut.load_model(slim)(images))


@pytest.mark.slow
def test_the_card_says_what_was_cut(exported):
    folder = exported("swin").output
    card = (folder / "README.md").read_text()
    assert card.startswith("---\ntags:")
    assert "license" not in card  # random weights, not those of timm
    assert "pip install" not in card
    assert "library_name: mhacut" in card
    plan = read_model(folder).record.plan
    assert any(unit.keeps_all for unit in plan)
    for unit in plan:
        assert (f"| `{unit.layer}` | {unit.kind} |" in card) != unit.keeps_all
        assert unit.keeps_all or f"| {unit.width} | {unit.dense_width} | {unit.basis} |" in card
    assert "(dense: " in card
    assert 'timm.create_model("local-dir:folder", pretrained=True)' in card


def carded(checkpoint, folder, **options):
    mhacut.export(checkpoint, format="timm", output=folder, **options)
    return (folder / "README.md").read_text(), json.loads((folder / "config.json").read_text())


@pytest.mark.slow
def test_a_bare_file_has_no_license_and_no_tag_but_what_is_given(tiny_vit, tmp_path):
    """timm's default for the architecture states those of timm's own weights."""
    options = tiny_vit.options
    assert timm.get_pretrained_cfg(tiny_vit.architecture).license
    card, config = carded(tiny_vit.path, tmp_path / "bare", **options)
    assert "license" not in card
    assert "mhacut" not in card
    assert config["pretrained_cfg"].keys().isdisjoint({"license", "tag", "origin_url", "paper_ids"})
    assert "timm's default for vit_tiny_patch16_224; the file has none" in card
    card, config = carded(tiny_vit.path, tmp_path / "given", license="cc-by-4.0", **options)
    assert "\nlicense: cc-by-4.0\n---\n" in card
    assert config["pretrained_cfg"]["license"] == "cc-by-4.0"
    # What a folder says of its own weights is known of it, and of what is cut from it.
    assert "\nlicense: cc-by-4.0\n" in carded(tmp_path / "given", tmp_path / "again")[0]
    slim = tmp_path / "slim.safetensors"
    mhacut.prune(tmp_path / "given", flops="60%", output=slim, latency=False, calibration_images=8)
    card, config = carded(slim, tmp_path / "cut")
    assert "\nlicense: cc-by-4.0\n" in card
    assert "Top-1" not in card
    assert "tag" not in config["pretrained_cfg"]


@pytest.mark.slow
def test_the_card_states_accuracy_where_it_is_known(tiny_vit, tmp_path):
    for split in ("train", "val"):
        write_split(tmp_path / split, map(str, range(7)), per_class=2)
    given = {"data_dir": tmp_path, "workers": 0}
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    cut = {"latency": False, "calibration_images": 8, "effort": "fast", **given}
    options = tiny_vit.options
    once = mhacut.prune(tiny_vit.path, flops="80%", output=first, **options, **cut)
    twice = mhacut.prune(first, flops="80%", output=second, **cut)
    tuned = mhacut.finetune(second, output=tmp_path / "run", steps=1, batch_size=7, **given)
    made = ((first, once.slim.evaluation), (second, twice.slim.evaluation), (tuned.output, tuned.after))
    before = f"dense {once.dense.evaluation.top1:.2f} % of 14 images"
    for file, after in made:
        card, _ = carded(file, tmp_path / f"card of {file.stem}")
        shown = f"{before}, this model {after.top1:.2f} % of 14 images"
        assert f"- **Top-1 accuracy:** {shown}\n" in card
        assert "(dense: " in card


@pytest.mark.parametrize(
    ("entry", "base"),
    [
        ({"accuracy": 3, "source": "hf-hub:some/vit@main"}, "some/vit"),
        ({"accuracy": {"top1_after": 1e9, "images": 5}, "source": "hf-hub:a/b\nevil: 1"}, None),
        ({"source": "timm:vit_tiny_patch16_224.augreg_in21k"}, "timm/vit_tiny_patch16_224.augreg_in21k"),
        ({"source": "timm:vit_tiny_patch16_224.none"}, None),
        ({"source": "a/b.safetensors"}, None),
    ],
)
def test_a_card_states_of_any_history_what_makes_sense(tiny_vit, tmp_path, entry, base):
    path = tmp_path / "slim.safetensors"
    model, record = make_slim(tiny_vit.path, path, **tiny_vit.options)
    hostile = "<script>\x1b[2J\n[a](javascript:x)"
    told = dict.fromkeys(("data", "seed", "versions", hostile), hostile)
    record = dataclasses.replace(record, history=({"license": "mit\nevil: 1", **told, **entry},))
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    write_slim(path, model, record, dtypes=dtypes, overwrite=True, input_path=None)
    card, _ = carded(path, tmp_path / "folder")
    assert all(text not in card for text in ("evil", "javascript", "<script>", "\x1b", "Top-1"))
    assert re.findall(r"^base_model: (.*)$", card, re.MULTILINE) == ([base] if base else [])


def test_half_the_bytes(folder, slim_of, tmp_path):
    result = mhacut.export(slim_of("vit"), format="timm", dtype="bfloat16", output=tmp_path / "half")
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, tmp_path / "half")]
    assert sizes[1] < 0.7 * sizes[0]
    assert 0 < result.difference[2] < 0.1


def test_what_must_not_be_written_over(folder, slim_of, tmp_path, monkeypatch):
    slim, taken = slim_of("vit"), tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        mhacut.export(slim, format="timm", output=taken)
    mhacut.export(slim, format="timm", output=taken, overwrite=True)
    assert {path.name for path in taken.iterdir()} == {
        "notes.txt",
        "README.md",
        "config.json",
        "model.py",
        "model.safetensors",
    }
    with pytest.raises(OutputError, match="is the input"):
        mhacut.export(folder, format="timm", output=folder, overwrite=True)
    with pytest.raises(OutputError, match="is a file"):
        mhacut.export(slim, format="timm", output=slim)
    with pytest.raises(UsageError, match="fixed_batch=1: expected another format"):
        mhacut.export(slim, format="timm", fixed_batch=1)
    monkeypatch.setitem(exporting.TOLERANCE, "float32", -1.0)
    with pytest.raises(MhacutError, match="the exported timm model differs"):
        mhacut.export(slim, format="timm", output=tmp_path / "never")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_an_architecture_without_a_cut_says_what_it_needs(slim_of):
    with pytest.raises(CheckpointError, match="base_architecture or plan is missing"):
        timm.create_model("mhacut_slim")
    plan = read_model(slim_of("vit")).record.plan.to_json()
    with pytest.raises(CheckpointError, match=r"base_architecture: .*no_such_model"):
        timm.create_model("mhacut_slim", base_architecture="no_such_model", plan=plan)
    with pytest.raises(CheckpointError, match="base_architecture"):
        timm.create_model("mhacut_slim", base_architecture="mhacut_slim", plan=plan)
