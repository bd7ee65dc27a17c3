"""Bytes and texts from anyone: read, or refused with an error of ours, and nothing else.

``FUZZ_EXAMPLES=20000 pytest tests/tools/test_fuzz.py`` tries a thousand times as many.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from helpers.checkpoints import torch_file, zipped
from helpers.finetuning import small_trainer, take_steps
from mhacut.budget import KINDS, Budget
from mhacut.checkpoint.files import read_file_header, read_tensors
from mhacut.checkpoint.folder import open_folder
from mhacut.checkpoint.identity import checked_model_args, checked_pretrained_cfg
from mhacut.checkpoint.record import SlimRecord
from mhacut.checkpoint.training import read_training
from mhacut.errors import CheckpointError, MhacutError, UsageError
from mhacut.finetuning.folder import RunFolder
from mhacut.options.option import key_value, read_config
from mhacut.options.prune import PruneOptions

pytestmark = pytest.mark.slow
few = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "20")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SAFE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}
UNIT = {"layer": "blocks.0.mlp", "kind": "hidden", "dense_width": 8, "kept": [[0, 5, 7]]}
SIZES = {"input_size": [3, 32, 32], "mean": [0.5], "std": [0.5], "interpolation": "bicubic"}
RECORD = {
    "format_version": 1,
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"num_classes": 10},
    "pretrained_cfg": {},
    "plan": [UNIT],
    "preprocessing": {**SIZES, "crop_pct": 0.9, "crop_mode": "center"},
    "history": [{"command": "prune"}],
}


@contextmanager
def refused_only_as(kind: type[MhacutError], *says: str) -> Iterator[None]:
    """A block that ends well, or in such an error, whose message has one of these texts."""
    try:
        yield
    except kind as error:
        message = str(error)
    else:
        return
    assert any(text in message for text in says)


def read(folder: Path, content: bytes) -> None:
    path = folder / "model"
    path.write_bytes(content)
    with refused_only_as(CheckpointError, str(path)):
        header = read_file_header(path)
        read_training(header.training)
        assert read_tensors(header).keys() == header.tensors.keys()


def read_pickle(folder: Path, content: bytes) -> None:
    storages = {f"m/data/{number}": bytes(size) for number, size in enumerate((24, 4))}  # of SAFE
    read(folder, zipped({"m/data.pkl": content, "m/version": b"3\n", **storages}))


def read_header(folder: Path, content: bytes) -> None:
    read(folder, struct.pack("<Q", len(content)) + content + bytes(12))


def read_record(folder: Path, content: bytes) -> None:
    with refused_only_as(CheckpointError, ""):
        record = SlimRecord.from_json(content.decode(errors="replace"))
        assert SlimRecord.from_json(record.to_json()) == record


def read_options(folder: Path, content: bytes) -> None:
    (folder / "run.yaml").write_bytes(content)
    with refused_only_as(UsageError, "run.yaml"):
        options = PruneOptions.options()
        assert set(read_config(folder / "run.yaml", options, "run.yaml")) <= set(options)


def resume(folder: Path, content: bytes) -> None:
    run = RunFolder(folder)
    run.write_state({})
    (folder / "state.pt").write_bytes(content)
    with refused_only_as(CheckpointError, str(folder)):
        small_trainer().load_state_dict(run.read_state()["trainer"])


def saved_state() -> bytes:
    trainer, folder = small_trainer(), io.BytesIO()
    take_steps(trainer, 0, 4)
    torch.save({"trainer": trainer.state_dict()}, folder)
    return folder.getvalue()


def checkpoint(**options) -> bytes:
    state = {"state_dict": SAFE, "args": {"model": "vit_tiny_patch16_224"}, "epoch": 3}
    return torch_file(state, **options)


def pickled() -> bytes:
    with zipfile.ZipFile(io.BytesIO(checkpoint())) as archive:
        return next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))


def header() -> bytes:
    entries = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    entries["b"] = {"dtype": "F16", "shape": [2, 1], "data_offsets": [8, 12]}
    return json.dumps({"__metadata__": {"note": "{}"}, **entries}).encode()


OPTIONS = b"seed: 1\nteacher-model-arg: {depth: 2}\nstd: &a [0.5, 1]\nmean: *a\n"
TARGETS: dict[str, tuple[Callable[[Path, bytes], None], Callable[[], list[bytes]]]] = {
    "header": (read_header, lambda: [header()]),
    "torch": (read, lambda: [checkpoint(), checkpoint(_use_new_zipfile_serialization=False)]),
    "pickle": (read_pickle, lambda: [pickled()]),
    "record": (read_record, lambda: [json.dumps(RECORD).encode()]),
    "yaml": (read_options, lambda: [OPTIONS]),
    "state": (resume, lambda: [saved_state()]),
}
"""Readers by name, and inputs to damage."""


@st.composite
def changed(draw, whole: bytes) -> bytes:
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 16))
        kind = draw(st.sampled_from(["replace", "cut", "repeat", "insert", "truncate"]))
        if kind == "replace":
            content[at : at + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == "cut":
            del content[at : at + length]
        elif kind == "repeat":
            content[at:at] = content[at : at + length]
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=16))
        else:
            del content[at:]
    return bytes(content)


@pytest.mark.parametrize("target", TARGETS)
@few
@given(data=st.data())
def test_damaged_files(tmp_path, target, data):
    run, seeds = TARGETS[target]
    run(tmp_path, data.draw(changed(data.draw(st.sampled_from(seeds())))))


def test_a_member_whose_name_is_no_text_is_refused(tmp_path):
    resume(tmp_path, saved_state().replace(b"archive/version", b"\xffrchive/version"))


def test_seeds_are_read(tmp_path):
    """Or nothing above would reach what it is to reach."""
    for content in (checkpoint(), checkpoint(_use_new_zipfile_serialization=False)):
        (tmp_path / "model").write_bytes(content)
        assert set(read_tensors(read_file_header(tmp_path / "model"))) == set(SAFE)
    assert SlimRecord.from_json(json.dumps(RECORD)).plan.units
    RunFolder(tmp_path).write_state({"trainer": small_trainer().state_dict()})
    assert RunFolder(tmp_path).read_state() is not None


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(["state_dict", "model", "args", "config", "a.b", "c.d"]) | st.integers()
TENSORS = st.sampled_from(
    [torch.ones(2), torch.ones(2, 3).t(), torch.ones(1).cfloat(), torch.ones(3).to_sparse()]
)
SAVED = st.recursive(
    values | st.binary(max_size=8) | TENSORS | st.sampled_from([torch.Size([1]), torch.float32]),
    lambda inner: st.tuples(inner) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
NAMES = ["collections\nOrderedDict", "torch._utils\n_rebuild_tensor_v2", "yacs.config\nCfgNode", "os\nsystem"]
PHRASES = [b"}q\x00", b"X\x01\x00\x00\x00a", b"\x85R", b"K\x01", *(f"c{name}\n".encode() for name in NAMES)]
PICKLES = st.lists(st.sampled_from([*(bytes([code]) for code in range(256)), *PHRASES * 8]), max_size=40)


@few
@given(value=SAVED, content=PICKLES)
def test_whatever_torch_saves_and_any_pickle(tmp_path, value, content):
    read(tmp_path, torch_file(value))
    read_pickle(tmp_path, b"\x80\x02" + b"".join(content) + b".")


def replace_some(data, document: dict) -> None:
    for _ in range(data.draw(st.integers(0, 2))):
        place, key = document, data.draw(st.sampled_from(sorted(document, key=str)))
        while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
            place = place[key]
            keys = sorted(place, key=str) if isinstance(place, dict) else range(len(place))
            key = data.draw(st.sampled_from(list(keys)))
        place[key] = data.draw(values)


@few
@given(data=st.data())
def test_records_with_other_values(tmp_path, data):
    record = json.loads(json.dumps(RECORD))
    replace_some(data, record)
    read_record(tmp_path, json.dumps(record).encode())


@few
@given(config=values, args=values, cfg=values)
def test_configurations(tmp_path, config, args, cfg):
    for check, value in ((checked_model_args, args), (checked_pretrained_cfg, cfg)):
        if isinstance(value, dict):
            with suppress(CheckpointError):
                assert json.loads(json.dumps(check(value))) is not None
    (tmp_path / "model.safetensors").write_bytes(save(SAFE))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused_only_as(CheckpointError, "config.json"):
        assert json.dumps(open_folder(tmp_path)[1]) == json.dumps(config)


MARKS = [
    *"-:?[]{},&*!|>'\"%@`#~=. \n",
    "&a ",
    "*a",
    "!!",
    "- ",
    "<<: ",
    "steps: ",
    "output: ",
    "model-args: ",
]
WORDS = ["timestamp ", "int ", "set ", "python/name:os.system ", ".nan", "1:2", "0x", "2001-01-01", "null"]


@few
@given(text=st.lists(st.sampled_from([*MARKS, *WORDS]) | st.text(max_size=3), max_size=30).map("".join))
def test_yaml(tmp_path, text):
    read_options(tmp_path, text.encode(errors="surrogatepass"))


@few
@given(
    text=st.text(max_size=12) | st.from_regex(r"[0-9.,eE+-]{0,8}([KMGT]i?B?|%|B)?", fullmatch=True),
    resource=st.sampled_from(sorted(KINDS)),
    dense=st.integers(1, 10**15),
)
def test_budgets(text, resource, dense):
    with refused_only_as(UsageError, "is not a budget", "more than the dense model has"):
        amount = Budget.parse(text, resource).amount(dense)
        assert isinstance(amount, int)
        assert amount >= 0


@few
@given(text=st.text(max_size=30) | st.text("[(1,2)]{}:'\"a=-.", max_size=40).map("a=".__add__))
def test_pairs(text):
    with suppress(MhacutError):
        key, value = key_value("--model-arg", text)
        assert key.isidentifier()
        checked_model_args({key: value})
