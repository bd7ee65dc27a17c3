"""The slim file's document: what is written is read back, and nothing else is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mhacut.checkpoint.identity import ModelIdentity, checked_model_args, checked_pretrained_cfg
from mhacut.checkpoint.record import FORMAT_VERSION, MAX_RECORD_CHARS, SlimRecord
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
        (changed(format_version=FORMAT_VERSION + 1), "upgrade mhacut"),
        (changed(format_version=True), "format_version: expected a whole number"),
        (changed(format_version=...), "format_version: expected a whole number, found None"),
        (changed(surprise=1), "keys not known ['surprise']"),
        (changed(plan=...), "keys missing ['plan']"),
        (changed(plan=[{**UNIT, "kept": [[0, 8]]}]), "must lie in 0..7"),
        (changed(plan=[{**UNIT, "kept": [[-1, 5, 7]]}]), "must lie in 0..7"),
        (changed(plan=[{**UNIT, "kept": [[0, 1.5]]}]), "kept is a list of channel indices"),
        (changed(plan=[{**UNIT, "layer": "__import__('os')", "kept": [[0]]}]), "not a module name"),
        (changed(layers={}), "widths in layers and the plan disagree"),
        (changed(architecture="hf-hub:evil/model"), "expected the name of a timm model"),
        (changed(architecture="../../etc/passwd"), "expected the name of a timm model"),
        (changed(architecture=7), "expected the name of a timm model"),
        (changed(model_args={"embed_dim": 10**9}), "model_args 'embed_dim': numbers may reach 1000000"),
        (
            changed(model_args={"checkpoint_path": "/etc/passwd"}),
            "'checkpoint_path' does not describe a model",
        ),
        (changed(model_args={"pretrained": True}), "'pretrained' does not describe a model"),
        (changed(model_args={"x y": 1}), "'x y' is not an argument name"),
        (changed(model_args={"a": [[[[[[1]]]]]]}), "nested too deeply"),
        (changed(model_args=[]), "model_args: expected an object, found list"),
        (changed(pretrained_cfg={"input_size": [3, 10**9, 10**9]}), "pretrained_cfg 'input_size'"),
        (changed(pretrained_cfg={"input_size": [3, 2049, 2048]}), "pretrained_cfg 'input_size': at most"),
        (changed(pretrained_cfg={"test_input_size": [3, 9999, 999]}), "pretrained_cfg 'test_input_size': at"),
        (changed(model_args={"img_size": 2049}), "model_args 'img_size': at most 4194304 pixels"),
        (changed(model_args={"img_size": [2048, 2049]}), "model_args 'img_size': at most 4194304 pixels"),
        (
            changed(basis="principal component of os.system"),
            "basis 'principal component of os.system' and the",
        ),
        (changed(basis="principal"), "basis 'principal' and the plan disagree"),
        (changed(basis=["channel"]), "basis ['channel'] and the plan disagree"),
        (changed(plan=[{**UNIT, "kept": [[0]], "basis": "os.system"}]), "basis is one of channel, principal"),
        (changed(plan=[{**UNIT, "kept": [[0]], "basis": 1}]), "text for layer, kind, basis"),
        (changed(history={}), "history: expected a list, found dict"),
        (changed(history=["prune"]), "history: expected one object per command"),
        (changed(preprocessing={**PREPROCESSING, "mean": ["0.5"] * 3}), "mean is 1 or 3 numbers"),
        (changed(preprocessing={**PREPROCESSING, "std": [0, 0, 0]}), "std is at least 1e-06"),
        (
            changed(preprocessing={**PREPROCESSING, "input_size": [3, 32]}),
            "input_size: expected channels, height, width",
        ),
        (
            changed(preprocessing={**PREPROCESSING, "input_size": [3, 30000, 30000]}),
            "preprocessing: input_size: at most 4194304 pixels (2048x2048) are allowed, found 30000x30000",
        ),
        (
            changed(preprocessing={**PREPROCESSING, "input_size": [17, 2048, 2048], "mean": [0], "std": [1]}),
            "preprocessing: input_size: at most 67108864 values",
        ),
        (changed(preprocessing={**PREPROCESSING, "crop_pct": 0}), "crop_pct is 0.1 to 1.25"),
        (changed(preprocessing={**PREPROCESSING, "crop_pct": 1.5}), "crop_pct is 0.1 to 1.25"),
        (changed(preprocessing={**PREPROCESSING, "interpolation": "a b"}), "interpolation is a word"),
        (changed(preprocessing={}), "expected exactly the keys crop_mode, crop_pct"),
        ('{"format_version":1,"format_version":1}', "key 'format_version' appears twice"),
        ("[1]", "expected an object, found list"),
        ("{", "not valid JSON"),
        ('{"a": NaN}', "NaN is not JSON"),
        ("[" * 200_000, "nested too deeply"),
        ("[" + "9" * 5000 + "]", "not valid JSON"),
        (" " * (MAX_RECORD_CHARS + 1), "characters are allowed"),
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
    with pytest.raises(CheckpointError, match="is a object; only text"):
        checked_model_args({"norm_layer": object()})
    with pytest.raises(CheckpointError, match="is nan"):
        record(history=({"seconds": float("nan")},))


def test_reading_a_record_needs_no_torch():
    code = "import sys, mhacut.checkpoint.record; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
