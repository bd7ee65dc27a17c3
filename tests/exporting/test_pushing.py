"""``mhacut export --push-to-hub`` against stand-ins of three functions of ``huggingface_hub``."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest

import mhacut
from helpers.cli import succeed
from mhacut.errors import MhacutError

ADDRESS = "https://hub/some/vit/commit/1"


class Hub:
    def __init__(self) -> None:
        self.created: list[tuple[str, bool]] = []
        self.files: dict[str, bytes] = {}
        self.refuses = ""

    def answer(self, request: str) -> None:
        if request == self.refuses:
            raise OSError(f"403 Forbidden: {request}\nRequest ID: 1")

    def whoami(self) -> None:
        self.answer("whoami")

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
        self.answer("create")
        assert exist_ok
        self.created.append((name, private))

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message) -> SimpleNamespace:
        self.answer("upload")
        for file in Path(folder_path).iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                self.files[file.name] = file.read_bytes()
        return SimpleNamespace(commit_url=ADDRESS)


@pytest.fixture
def hub(monkeypatch) -> Hub:
    found = Hub()
    for name in ("whoami", "create_repo", "upload_folder"):
        monkeypatch.setattr(f"huggingface_hub.{name}", getattr(found, name))
    return found


def test_what_is_pushed_is_the_folder(hub, slim_of, tmp_path):
    folder = tmp_path / "folder"
    flags = ["--format", "timm", "--push-to-hub", "some/vit", "--private", "--license", "apache-2.0"]
    result = succeed("export", slim_of("vit"), *flags, "-o", folder)
    assert f"pushed {ADDRESS}" in result.stdout
    assert hub.created == [("some/vit", True)]
    assert hub.files == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert b"license: apache-2.0" in hub.files["README.md"]
    assert b'timm.create_model("hf-hub:some/vit", pretrained=True)' in hub.files["README.md"]


def test_other_files_of_the_folder_stay_at_home(hub, slim_of, tmp_path):
    (tmp_path / "secrets.txt").write_text("mine")
    mhacut.export(slim_of("vit"), output=tmp_path, overwrite=True, format="timm", push_to_hub="some/vit")
    assert set(hub.files) == {"model.safetensors", "config.json", "README.md", "model.py"}


@pytest.mark.parametrize("refused", ["create", "upload"])
def test_a_folder_that_the_hub_refuses_stays(refused, hub, slim_of, tmp_path):
    hub.refuses = refused
    with pytest.raises(MhacutError, match=r"push_to_hub='some/vit': failed \(403.*\)\. .*was written"):
        mhacut.export(slim_of("vit"), output=tmp_path / "a", format="timm", push_to_hub="some/vit")
    assert (tmp_path / "a" / "model.safetensors").exists()
    assert hub.files == {}


def test_a_token_that_the_hub_refuses(hub, tmp_path):
    hub.refuses = "whoami"
    with pytest.raises(MhacutError, match=r"refuses uploads \(403.*\)\. Run hf auth login, or"):
        mhacut.export("no such file", output=tmp_path / "a", format="timm", push_to_hub="some/vit")
    assert hub.created == []
    assert list(tmp_path.iterdir()) == []
