"""Files whose metadata and tensors disagree are refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.checkpoints import ARGS, NAME, make_slim, refusal
from mhacut.checkpoint.load import open_checkpoint
from mhacut.checkpoint.record import METADATA_KEY


def relabel(path, **changes):
    with torch.no_grad():
        tensors = load_file(path)
    document = json.loads(open_checkpoint(path).header.metadata[METADATA_KEY])
    plan = changes.pop("plan", lambda units: units)
    document |= {**changes, "plan": plan(document["plan"])}
    save_file(tensors, path, {METADATA_KEY: json.dumps(document)})


def widened(units):
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
        ({"plan": widened}, "the model has 1 heads of 192 channels, the plan expects 1 of 1000000000"),
        ({"plan": one_less}, "0 missing, 0 unexpected, 3 of another shape\n"),
        ({"plan": elsewhere}, "the model has no layer"),
        ({"plan": lambda units: []}, "metadata and tensors do not match"),
        (
            {"architecture": "resnet18", "model_args": {}, "pretrained_cfg": {}},
            "no attention layer that mhacut can cut",
        ),
        ({"architecture": "no_such_model"}, "timm has no model 'no_such_model'"),
        ({"model_args": {**ARGS, "num_classes": 11}}, "2 of another shape"),
        ({"model_args": {**ARGS, "mlp_ratio": 10**6}}, "the plan expects 1 of 192"),
        ({"model_args": {**ARGS, "depth": 10**6}}, "is far too large for the tensors"),
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
