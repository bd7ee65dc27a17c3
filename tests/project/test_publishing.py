"""The scripts that publish a release and list published models, against stand-ins of what they ask."""

from __future__ import annotations

import http.server
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINK = '<a href="/mhacut-{0}.tar.gz">mhacut-{0}.tar.gz</a>'


@pytest.fixture
def served(tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    (folder := tmp_path / "served").mkdir()
    handler = partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def run(*words, **environment) -> tuple[int, str]:
    ran = subprocess.run(
        [sys.executable, *words], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    return ran.returncode, ran.stdout + ran.stderr


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".ci").exists(), reason="no clone")
def test_a_release_is_built_when_it_is_ready_and_uploaded_by_hand(served, tmp_path):
    folder, address = served
    write(folder, {"paper": "", "simple/mhacut/index.html": LINK.format("0.1.0")})
    tools, root = tmp_path / "tools", tmp_path / "root"
    build = "import sys, pathlib as p; d = p.Path(sys.argv[-1]); d.mkdir(parents=True)\n"
    build += "for end in ('.tar.gz', '-py3-none-any.whl'): (d / ('mhacut-0.2.0' + end)).touch()"
    write(tools, {"build.py": build, "twine.py": "import sys; print('twine', *sys.argv[1:3])"})
    ready = {
        "mhacut/_version.py": '__version__ = "0.2.0"\n',
        "CITATION.cff": "version: 0.2.0\ndate-released: 2030-01-01\n",
        "CHANGELOG.md": "## 0.2.0 (2030-01-01)\n\n## 0.1.0 (2029-01-01)\n",
        "README.md": f"[paper]({address}/paper), pip install git+https://github.com/OWNER/mhacut",
        "examples/a.ipynb": "{}",
        ".gitignore": "dist/",
    }
    write(root, ready)
    (root / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "release.py", root / ".ci")
    git = ["git", "-C", root, "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    script = partial(run, root / ".ci" / "release.py", PIP_INDEX_URL=f"{address}/simple")
    code, text = script(PYTHONPATH=str(tools))
    assert code == 0, text
    assert "twine check --strict" in text
    assert f"twine upload {root}/dist/0.2.0/mhacut-0.2.0-py3-none-any.whl" in text

    shutil.rmtree(root / "dist")
    write(folder, {"simple/mhacut/index.html": LINK.format("0.2.0")})
    write(
        root,
        {
            "CITATION.cff": "version: 0.1.0\n",
            "CHANGELOG.md": "# 0.2.0\n",
            "README.md": f"<{address}/gone>",
            "examples/a.ipynb": "https://github.com/OWNER/mhacut",
        },
    )
    code, text = script(PYTHONPATH=str(tools))
    assert (code, (root / "dist").exists()) == (1, False), text
    for fault in (
        "version 0.1.0, but mhacut/_version.py has 0.2.0",
        "no date-released",
        "no heading '## 0.2.0 (DATE)'",
        "not committed: CHANGELOG.md",
        "names github.com/OWNER",
        "has 0.2.0 already",
        f"{address}/gone: HTTP Error 404",
    ):
        assert fault in text
