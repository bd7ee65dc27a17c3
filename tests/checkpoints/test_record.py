"""The slim file's document: what is written is read back, and nothing else is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mhacut.checkpoint.identity import ModelIdentity, checked_model_args, checked_pretrained_cfg
from mhacut.checkpoint.record import FORMAT_VERSION, SlimRecord
from mhacut.errors import CheckpointError
from mhacut.plan import Plan, UnitPlan

PREPROCESSING = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}


def record(**changes) -> SlimRecord:
    plan = Plan(
        (
            UnitPlan("blocks.0.attn", "qk", 4, ((0, 2), (1, 3))),
            UnitPlan("blocks.0.attn", "v", 4, ((0, 1, 2), (1, 2, 3))),
            UnitPlan("blocks.0.mlp", "hidden", 8, ((0, 5, 7),)),
        )
    )
    fields = {
        "identity": ModelIdentity(
            "vit_tiny_patch16_224", {"num_classes": 10, "img_size": (32, 32)}, {"mean": (0.5,)}
        ),
        "plan": plan,
        "preprocessing": PREPROCESSING,
        "history": ({"command": "prune", "seed": 0, "flops_before": 2e9, "versions": {"torch": "2.13"}},),
    }
    return SlimRecord(**{**fields, **changes})


def test_what_is_written_is_read_back():
    assert SlimRecord.from_json(record().to_json()) == record()


def test_widths_are_there_for_people():
    layers = json.loads(record().to_json())["layers"]
    assert layers["blocks.0.attn"] == {"heads": 2, "qk_width": 2, "v_width": 3}
    assert layers["blocks.0.mlp"] == {"hidden_width": 3}


def changed(**changes) -> str:
    document = {**json.loads(record().to_json()), **changes}
    return json.dumps({key: value for key, value in document.items() if value is not ...})


UNIT = {"layer": "blocks.0.mlp", "kind": "hidden", "dense_width": 8}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (changed(format_version=FORMAT_VERSION + 1), "Upgrade mhacut"),
        (changed(format_version=True), "format_version: expected a number from 1"),
        (changed(format_version=...), "format_version: expected a number from 1, found None"),
        (changed(plan=...), "missing keys plan"),
        (changed(plan=[{**UNIT, "kept": [[0, 8]]}]), "must lie in 0..7"),
        (changed(plan=[{**UNIT, "kept": [[0, 1.5]]}]), "`kept` must be a list of channel indices"),
        (changed(plan=[{**UNIT, "layer": "__import__('os')", "kept": [[0]]}]), "expected a layer name"),
        (
            changed(plan=[{**UNIT, "kept": [[0]], "basis": "os.system"}]),
            "expected the basis channel or principal",
        ),
        (changed(architecture="../../etc/passwd"), "expected the name of a timm model"),
        (changed(architecture=7), "expected the name of a timm model"),
        (changed(model_args={"checkpoint_path": "/etc"}), "'checkpoint_path' is not allowed"),
        (changed(model_args={"x y": 1}), "expected argument names, found 'x y'"),
        (changed(model_args=[]), "model_args: expected an object, found list"),
        (changed(pretrained_cfg={"input_size": [3, 2049, 2048]}), "pretrained_cfg 'input_size': at most"),
        (changed(model_args={"img_size": 2049}), "model_args 'img_size': at most 4194304 pixels"),
        (changed(history={}), "history: expected a list with one object per command"),
        (changed(history=["prune"]), "history: expected a list with one object per command"),
        (changed(preprocessing={**PREPROCESSING, "std": [0, 0, 0]}), "std [0, 0, 0]: expected 3 number"),
        (changed(preprocessing={**PREPROCESSING, "crop_pct": 0}), "expected at least 0.1, at most 1.25"),
        (changed(preprocessing={}), "preprocessing: "),
        (changed(preprocessing=[]), "preprocessing: expected an object, found []"),
        ("[1]", "expected a JSON object, found list"),
        ("{", "not valid JSON"),
        ("[" * 200_000, "not valid JSON"),
        ("[" + "9" * 5000 + "]", "not valid JSON"),
    ],
)
def test_anything_else_is_refused_and_says_why(text, says):
    with pytest.raises(CheckpointError) as error:
        SlimRecord.from_json(text)
    assert says in str(error.value)


def test_sources_of_weights_are_dropped_from_the_pretrained_cfg():
    cfg = {
        "url": "http://x",
        "file": "/etc/passwd",
        "hf_hub_id": "a/b",
        "source": "x",
        "mean": (0.5, 0.5, 0.5),
    }
    assert checked_pretrained_cfg(cfg) == {"mean": [0.5, 0.5, 0.5]}


def test_only_plain_values_can_be_stored():
    with pytest.raises(CheckpointError, match="cannot be stored as JSON: Object of type object"):
        checked_model_args({"norm_layer": object()})
    with pytest.raises(CheckpointError, match="not JSON compliant"):
        record(history=({"seconds": float("nan")},))


def test_reading_a_record_needs_no_torch():
    code = "import sys, mhacut.checkpoint.record; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
