"""A folder in the cache of the hub opens as one on disk, and nothing waits for a network."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.checkpoints import ARGS, IMAGES, NAME, refusal, save, tiny
from mhacut.checkpoint import hub
from mhacut.checkpoint.load import read_model, states_its_model
from mhacut.cli.paths import check_paths
from mhacut.options.evaluate import EvaluateOptions

REVISION = "0" * 40
CONFIG = {"architecture": NAME, "model_args": ARGS, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Make a repository in the cache of a hub that is out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def make(config=None, *, weights=True):
        repository = tmp_path / "models--some--vit"
        folder, blob = repository / "snapshots" / REVISION, repository / "blobs" / "1"
        for directory in (folder, blob.parent, repository / "refs"):
            directory.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(REVISION)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        if weights:
            save(tiny(), blob)
            (folder / "model.safetensors").symlink_to(blob)

    return make


@pytest.mark.parametrize("source", ["hf-hub:some/vit", "hf_hub:some/vit@main"])
def test_a_folder_in_the_cache_is_opened(cache, source):
    cache(CONFIG)
    loaded = read_model(source)
    with torch.no_grad():
        assert torch.equal(loaded.model(IMAGES), tiny()(IMAGES))
    assert (loaded.source, loaded.stem) == (source, "vit")
    assert loaded.model.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    assert f"architecture {NAME}, from config.json" in loaded.notes
    assert states_its_model(source)
    check_paths(EvaluateOptions(checkpoint=source))


def test_what_the_cache_lacks_is_one_clear_sentence(cache):
    cache(CONFIG, weights=False)
    message = refusal("hf-hub:some/vit")
    assert message == (
        "hf-hub:some/vit: is not in the cache, and the Hugging Face hub cannot be reached; "
        "go online once, or give a folder or file"
    )
    assert "is not in the cache" in refusal("hf-hub:some/other")
    assert "could not be downloaded (Repo id must be in the form" in refusal("hf-hub:../../etc/passwd")
    assert "only contain one @" in refusal("hf-hub:a/b@c@d")


def test_a_repository_without_weights_or_configuration_says_so(cache, monkeypatch):
    cache(CONFIG, weights=False)
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    assert "hf-hub:some/vit: holds no weights (model.safetensors, " in refusal("hf-hub:some/vit")


def test_a_hub_out_of_reach_is_asked_once(cache, monkeypatch):
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append(timeout)
            raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    assert "the Hugging Face hub cannot be reached" in refusal("hf-hub:some/vit")
    assert len(asked) == 1
    assert asked[0] <= 5
