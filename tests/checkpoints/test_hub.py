"""Folders and timm's weights in the cache of the hub open as files do, and nothing waits for a network."""

from __future__ import annotations

import json
import re

import pytest
import timm
import torch
from safetensors.torch import save_file

from helpers.checkpoints import ARGS, IMAGES, NAME, refusal, tiny
from mhacut.checkpoint.checkpoint import sha256_of_tensors
from mhacut.checkpoint.folder import INDEXES
from mhacut.checkpoint.load import read_model, states_its_model
from mhacut.cli.flags import check_paths
from mhacut.options.measure import EvaluateOptions

REVISION = "0" * 40
CONFIG = {"architecture": NAME, "model_args": ARGS, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}
OF_TIMM = f"timm/{NAME}.augreg_in21k_ft_in1k"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Make a repository in the cache of a hub that is out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def make(repository="some/vit", *, config=CONFIG, tensors=None, shards=1):
        folder = tmp_path / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(REVISION)
        folder = folder / "snapshots" / REVISION
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        tensors = tiny().state_dict() if tensors is None else tensors
        names = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
        index = {name: names[number % shards] for number, name in enumerate(tensors)}
        if shards > 1:
            (folder / INDEXES[0]).write_text(json.dumps({"metadata": {}, "weight_map": index}))
        for file in names:
            part = {name: tensors[name] for name in tensors if index[name] == file}
            save_file(part, folder / (file if shards > 1 else "model.safetensors"))
        return folder

    return make


@pytest.mark.parametrize("source", ["hf-hub:some/vit", "hf_hub:some/vit@main"])
def test_a_folder_in_the_cache_is_opened(cache, source):
    cache()
    loaded = read_model(source)
    with torch.no_grad():
        assert torch.equal(loaded.model(IMAGES), tiny()(IMAGES))
    assert (loaded.source, loaded.stem) == (source, "vit")
    assert loaded.model.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    assert f"architecture {NAME}, from config.json" in loaded.notes
    assert states_its_model(source)
    check_paths(EvaluateOptions(checkpoint=source))


def test_what_the_cache_lacks_is_one_clear_sentence(cache):
    (cache() / "model.safetensors").unlink()
    assert refusal("hf-hub:some/vit") == (
        "hf-hub:some/vit: not in the cache, and the Hugging Face hub is unreachable. "
        "Go online once, or give a folder or file"
    )
    assert "not in the cache" in refusal("hf-hub:some/other")
    assert "could not be downloaded (Repo id must be in the form" in refusal("hf-hub:../../etc/passwd")
    assert "only contain one @" in refusal("hf-hub:a/b@c@d")


def test_shards_in_the_cache_are_opened_as_one(cache):
    folder = cache(shards=3)
    with torch.no_grad():
        assert torch.equal(read_model("hf-hub:some/vit").model(IMAGES), tiny()(IMAGES))
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "hf-hub:some/vit: not in the cache, and the" in refusal("hf-hub:some/vit")


def test_a_hub_out_of_reach_is_asked_once(cache, monkeypatch):
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append(timeout)
            raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    assert "the Hugging Face hub is unreachable" in refusal("hf-hub:some/vit")
    assert "(the Hugging Face hub is unreachable). Go online once" in refusal(f"timm:{NAME}")
    assert len(asked) == 2
    assert max(asked) <= 5


@pytest.mark.slow
def test_timm_names_are_checked_before_anything_is_fetched(cache):
    assert "did you mean vit_tiny_patch16_224" in refusal("timm:vit_tiny_patch16_22")
    assert "has no pretrained tag 'x'. Known tags: augreg" in refusal(f"timm:{NAME}.x")
    assert "No pretrained weights exist" in refusal("timm:vit_base_patch16_gap_224")
    assert "already names the model" in refusal(f"timm:{NAME}", model=NAME)
    assert "timm cannot build" in refusal(f"timm:{NAME}", model_args={"surprise": 1})
    said = refusal(f"timm:{NAME}")
    assert f"timm:{NAME}: the weights are not in the cache and could not be downloaded" in said
    assert "give a file and model" in said
    assert "\n" not in said


def test_timm_weights_from_the_cache(cache):
    weights = timm.create_model(NAME, **ARGS).state_dict()
    cache(OF_TIMM, tensors=weights)
    loaded = read_model(f"timm:{NAME}.augreg_in21k_ft_in1k", model_args=ARGS)
    assert torch.equal(loaded.model.norm.bias, weights["norm.bias"])
    assert (loaded.stem, loaded.path) == (f"{NAME}.augreg_in21k_ft_in1k", None)
    assert loaded.identity.model_args == {**ARGS, "num_classes": 1000}
    assert set(loaded.cfg_origins.values()) == {"pretrained"}
    digest = sha256_of_tensors(loaded.model.state_dict())
    loaded.model.norm.bias.data.zero_()
    assert loaded.sha256 == digest  # of the weights as they were read, whatever became of them
    said = refusal(f"timm:{NAME}", model_args=ARGS, num_classes=10)
    assert "the classifier has 1000 classes, not 10" in said
    headless = read_model(f"timm:{NAME}", model_args=ARGS, num_classes=0)
    assert headless.identity.model_args == {**ARGS, "num_classes": 0}
    found = headless.model.state_dict()
    assert found.keys() == {name for name in weights if not name.startswith("head.")}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("name", "change", "hints", "shown"),
    [
        (NAME, {"depth": 1}, {}, "Unexpected key"),
        (NAME, {"depth": 3}, {"num_classes": 0}, "Missing key"),
        (NAME, {"global_pool": "avg"}, {"num_classes": 0}, "Missing key.*fc_norm"),
        # timm itself loads these in part; the norm before the head would stay as it was initialised.
        ("vit_base_patch16_siglip_224", {"global_pool": "avg"}, {}, "no weights of fc_norm.weight"),
    ],
)
def test_timm_weights_never_leave_a_layer_random(cache, name, change, hints, shown):
    cfg = timm.get_pretrained_cfg(name)
    cache(f"timm/{cfg.architecture}.{cfg.tag}", tensors=timm.create_model(name, **ARGS).state_dict())
    message = refusal(f"timm:{name}", model_args={**ARGS, **change}, **hints)
    assert re.search(rf"the weights do not fit the model \({shown}.*\. Leave model_args=.* out", message)
