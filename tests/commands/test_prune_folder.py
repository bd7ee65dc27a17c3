"""``mhacut prune FOLDER --as huggingface``: folders of transformers stay what they are."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import mhacut
from helpers.cli import refusal, run, succeed
from helpers.data import write_split
from helpers.huggingface import dense_folder
from helpers.models import relative
from mhacut.errors import UsageError

QUICK = ("--as", "huggingface", "--flops", "70%", "--effort", "fast")


@pytest.mark.slow
def test_a_classifier_is_pruned_and_judged_as_itself(tmp_path, monkeypatch):
    folder = dense_folder(tmp_path / "dense", "Dinov2ForImageClassification", num_labels=3)
    out = tmp_path / "out"
    write_split(tmp_path / "images" / "val")
    write_split(tmp_path / "images" / "train", per_class=8)
    result = succeed("prune", folder, *QUICK, "-o", out, "--data-dir", tmp_path / "images", "--json")
    found = json.loads(result.stdout)
    assert found["slim"]["flops"] <= 0.7 * found["dense"]["flops"]
    assert found["preserved"] == {"what": "answers", "outputs": ["logits"]}
    assert found["judged_images"] == "validation images"
    assert 0 <= found["slim"]["top1"] <= 100
    assert (out / "preprocessor_config.json").read_bytes() == (
        folder / "preprocessor_config.json"
    ).read_bytes()
    config, dense_config = (json.loads((path / "config.json").read_text()) for path in (out, folder))
    assert config.keys() - dense_config.keys() == {"auto_map", "mhacut"}
    assert all(config[name] == value for name, value in dense_config.items())
    card = (out / "README.md").read_text()
    assert 'AutoModelForImageClassification.from_pretrained("out", trust_remote_code=True)' in card
    assert "| Dinov2ForImageClassification | dense | slim | ratio |\n|---|---|---|---|\n| top-1" in card
    slim, x = mhacut.load_pruned(out), torch.randn(4, 3, 28, 28)
    mhacut.save_pruned(slim, tmp_path / "tuned")
    assert {file.name for file in (tmp_path / "tuned").iterdir()} == {file.name for file in out.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("mhacut.commands.prune.same_outputs", lambda *_: False)
        message = refusal(tmp_path, "prune", folder, *QUICK, "-o", out, "--overwrite", "--seed", "1")
        assert "nothing was written" in message
    dense = type(slim).from_pretrained(folder)
    assert 0 < relative(slim(x).logits.detach(), dense(x).logits.detach()) < 1
    tokens = run("prune", folder, *QUICK, "-o", tmp_path / "tokens-{}", "--preserve", "tokens", "--json")
    found = json.loads(tokens.stdout)
    assert found["output"] == str(tmp_path / "tokens-70pct")
    assert found["architecture"] == "Dinov2ForImageClassification, FLOPs of dinov2"
    assert found["preserved"] == {"what": "tokens", "outputs": ["last_hidden_state"]}
    assert found["slim"]["flops"] <= 0.7 * found["dense"]["flops"]
    assert "exists already" in refusal(tmp_path, "prune", folder, *QUICK, "-o", out)
    assert run("prune", folder, *QUICK, "-o", out, "--dry-run").exit_code == 0
    assert "was pruned already" in refusal(tmp_path, "prune", out, *QUICK, "-o", tmp_path / "again", code=2)
    assert "is the input" in refusal(tmp_path, "prune", folder, *QUICK, "-o", folder, "--overwrite")


@pytest.mark.slow
def test_a_backbone_keeps_its_dtype_and_its_tokens(tmp_path):
    folder, out = dense_folder(tmp_path / "dense", "Dinov2Model", torch.float16), tmp_path / "out"
    result = mhacut.prune(folder, as_="huggingface", flops="70%", effort="fast", output=out)
    assert result.metric == "dense"
    assert {tensor.dtype for tensor in load_file(out / "pruned.safetensors").values()} == {torch.float16}
    x = torch.randn(2, 3, 28, 28)
    first, second = (
        model(x).last_hidden_state.detach() for model in (mhacut.load_pruned(out).float(), result.model())
    )
    assert relative(first, second) < 1e-6
    answers = refusal(tmp_path, "prune", folder, *QUICK, "--preserve", "answers", code=2)
    assert "--preserve answers: Dinov2Model is no classifier" in answers
    (folder / "preprocessor_config.json").unlink()
    assert "expected preprocessor_config.json" in refusal(tmp_path, "prune", folder, *QUICK)
    stated = (folder / "config.json").read_text()
    (folder / "config.json").write_text(stated.replace("Dinov2Model", "Dinov2ForImageClassification"))
    assert "tensors are missing: classifier.bias" in refusal(tmp_path, "prune", folder, *QUICK)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--params", "60%"), "--params 60% does not work with --as huggingface"),
        (("--flops", "50%", "-o", "out-{}"), "expected only 1 FLOPs budget with --as huggingface"),
        (("--img-size", "28"), "--img-size 28 does not work with --as huggingface"),
        (("--preserve", "pyramid"), "expected answers or tokens with --as huggingface"),
        (("--scope", "attention"), "expected auto or attention+mlp with --as huggingface"),
        (("-o", "a.safetensors"), "expected a folder"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_name(flags, message, tmp_path):
    assert message in refusal(tmp_path, "prune", tmp_path, *QUICK, *flags, code=2)


def test_a_module_and_torchrun_are_refused(monkeypatch):
    given = {"as_": "huggingface", "flops": "50%", "output": "out"}
    with pytest.raises(UsageError, match="found a module"):
        mhacut.prune(torch.nn.Linear(2, 2), **given)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="expected 1 process, found 2"):
        mhacut.prune("dense", **given)
