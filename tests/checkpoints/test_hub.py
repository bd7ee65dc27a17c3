"""A folder in the cache of the hub opens as one on disk, and nothing waits for a network."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file

from helpers.checkpoints import ARGS, IMAGES, NAME, refusal, save, tiny
from mhacut.checkpoint import hub
from mhacut.checkpoint.folder import INDEXES
from mhacut.checkpoint.load import read_model, states_its_model
from mhacut.cli.flags import check_paths
from mhacut.options.measure import EvaluateOptions

INDEX, INDEX_OF_TORCH = INDEXES
REVISION = "0" * 40
CONFIG = {"architecture": NAME, "model_args": ARGS, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}


def shard_name(number):
    return f"model-{number:05d}-of-00003.safetensors"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Make a repository in the cache of a hub that is out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def make(config=None, *, weights=True, shards=()):
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
        if shards:
            tensors = tiny().state_dict()
            names = [list(tensors)[:5], list(tensors)[5:20], list(tensors)[20:]]
            index = {name: shard_name(number) for number, part in enumerate(names, 1) for name in part}
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
            for number in shards:
                part = {name: tensors[name] for name in names[number - 1]}
                save_file(part, blob.with_name(str(number + 1)))
                (folder / shard_name(number)).symlink_to(blob.with_name(str(number + 1)))
        return folder

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
    assert "hf-hub:some/vit: lacks all weights (model.safetensors, " in refusal("hf-hub:some/vit")


def test_shards_in_the_cache_are_opened_as_one(cache):
    cache(CONFIG, weights=False, shards=(1, 2, 3))
    loaded = read_model("hf-hub:some/vit")
    with torch.no_grad():
        assert torch.equal(loaded.model(IMAGES), tiny()(IMAGES))


def test_shards_of_torch_in_the_cache_are_opened_as_one(cache):
    folder, tensors = cache(CONFIG, weights=False), tiny().state_dict()
    names = [f"pytorch_model-{number:05d}-of-00002.bin" for number in (1, 2)]
    for name, part in zip(names, (list(tensors)[:9], list(tensors)[9:]), strict=True):
        torch.save({key: tensors[key] for key in part}, folder / name)
    index = {key: names[number >= 9] for number, key in enumerate(tensors)}
    (folder / INDEX_OF_TORCH).write_text(json.dumps({"weight_map": index}))
    with torch.no_grad():
        assert torch.equal(read_model("hf-hub:some/vit").model(IMAGES), tiny()(IMAGES))


def test_an_index_may_list_a_single_file(cache):
    folder, name = cache(CONFIG, weights=False), "model-00001-of-00001.safetensors"
    save(tiny(), folder / name)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tiny().state_dict(), name)}))
    with torch.no_grad():
        assert torch.equal(read_model("hf-hub:some/vit").model(IMAGES), tiny()(IMAGES))


def test_shards_are_fetched_whole(cache, tmp_path, monkeypatch):
    """A hub that has everything, and a cache that has nothing."""
    remote = cache(CONFIG, weights=False, shards=(1, 2, 3))
    asked = []

    def download(repository, file, *, revision, local_files_only):
        assert (repository, revision, local_files_only) == ("some/vit", None, False)
        asked.append(file)
        if not (remote / file).exists():
            raise EntryNotFoundError(file)
        (tmp_path / "cached").mkdir(exist_ok=True)
        return shutil.copy(remote / file, tmp_path / "cached" / file)

    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    loaded = read_model("hf-hub:some/vit")
    assert asked[-4:] == [INDEX, shard_name(1), shard_name(2), shard_name(3)]
    with torch.no_grad():
        assert torch.equal(loaded.model(IMAGES), tiny()(IMAGES))
    (remote / shard_name(2)).unlink()
    assert "lacks all weights (model.safetensors, " in refusal("hf-hub:some/vit")


def test_a_cache_without_all_shards_is_incomplete(cache):
    cache(CONFIG, weights=False, shards=(1, 3))
    assert "hf-hub:some/vit: is not in the cache, and the" in refusal("hf-hub:some/vit")


@pytest.mark.parametrize("weight_map", [{"a": "../../etc/passwd"}, {"a": ["a.bin"]}, {}, []])
def test_an_index_names_nothing_but_files_beside_it(cache, weight_map):
    folder = cache(CONFIG, weights=False, shards=(1,))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "expected a weight_map with the names of files beside it" in refusal("hf-hub:some/vit")


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
