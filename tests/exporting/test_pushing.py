"""``mhacut export --push-to-hub`` against a stand-in of the hub's HTTP interface."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import mhacut
from helpers.cli import run
from mhacut.errors import MhacutError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own
TOKEN = "hf_" + "x" * 20


class Hub(ThreadingHTTPServer):
    """A hub that keeps what it is sent: ``created``, and ``files`` by name."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.created: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.refuses = ""


class Requests(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments):
        pass

    def answer(self, document: object, status: int = 200) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_HEAD(self) -> None:
        self.answer({})

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/whoami-v2":
            return self.answer({"type": "user", "name": "some"})
        if "create" in self.server.refuses:
            return self.answer({"error": "Repository not found"}, 404)
        return self.answer({"id": "some/vit", "sha": "0" * 40, "siblings": []})

    def do_PUT(self) -> None:
        self.server.large[self.path] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        body, server = self.body(), self.server
        if server.refuses and server.refuses in self.path:
            return self.answer({"error": "You have no write access"}, 403)
        if self.path == "/api/repos/create":
            server.created.append(json.loads(body))
            return self.answer({"url": f"{server.url}/some/vit"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": modes})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{server.url}/put/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    server.files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    server.files[value["path"]] = server.large[f"/put/{value['oid']}"]
            return self.answer({"commitUrl": f"{server.url}/some/vit/commit/1", "commitOid": "1"})
        return self.answer({"error": f"no such address: {self.path}"}, 404)


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_is_pushed_is_the_folder(hub, slim_of, tmp_path):
    folder = tmp_path / "folder"
    asked = {"format": "timm", "push_to_hub": "some/vit", "private": True, "license": "apache-2.0"}
    result = mhacut.export(slim_of("vit"), output=folder, **asked)
    assert result.pushed == f"{hub.url}/some/vit/commit/1"
    assert [(one["name"], one["organization"]) for one in hub.created] == [("vit", "some")]
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    assert hub.files == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert b"license: apache-2.0" in hub.files["README.md"]
    assert b'timm.create_model("hf-hub:some/vit", pretrained=True)' in hub.files["README.md"]
    weights = hashlib.sha256(hub.files["model.safetensors"]).hexdigest()
    assert list(hub.large) == [f"/put/{weights}"]


def test_other_files_of_the_folder_stay_at_home(hub, slim_of, tmp_path):
    (tmp_path / "secrets.txt").write_text("mine")
    mhacut.export(slim_of("vit"), output=tmp_path, overwrite=True, format="timm", push_to_hub="some/vit")
    assert set(hub.files) == {"model.safetensors", "config.json", "README.md"}


@pytest.mark.parametrize("refused", ["/repos/create", "/commit/"])
def test_a_folder_that_the_hub_refuses_stays(refused, hub, slim_of, tmp_path):
    hub.refuses = refused
    with pytest.raises(MhacutError, match=r"push_to_hub='some/vit': failed \(.*403.*was written"):
        mhacut.export(slim_of("vit"), output=tmp_path / "a", format="timm", push_to_hub="some/vit")
    assert (tmp_path / "a" / "model.safetensors").exists()
    assert hub.files == {}


def test_with_a_wrong_token_or_none(hub, tmp_path, monkeypatch):
    asked = {"output": tmp_path / "a", "format": "timm", "push_to_hub": "some/vit"}
    for token in ("hf_wrong", ""):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(MhacutError, match=r"refuses uploads \(.*\)\. Run hf auth login, or"):
            mhacut.export("no such file", **asked)
    assert hub.created == []
    assert list(tmp_path.iterdir()) == []


def test_the_command(hub, slim_of, tmp_path):
    flags = ["--format", "timm", "--push-to-hub", "some/vit", "-o", tmp_path / "a"]
    result = run("export", slim_of("vit"), *flags)
    assert result.exit_code == 0, result.stderr
    assert f"pushed {hub.url}/some/vit/commit/1" in result.stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"push_to_hub": "some/vit"}, "expected format='timm', the only format with a model card"),
        ({"push_to_hub": "vit", "format": "timm"}, "push_to_hub='vit': expected OWNER/NAME"),
        ({"push_to_hub": "../../vit", "format": "timm"}, "expected OWNER/NAME"),
    ],
)
def test_refused_before_any_work(options, expected):
    with pytest.raises(UsageError, match=expected):
        mhacut.export("no such file", **options)
