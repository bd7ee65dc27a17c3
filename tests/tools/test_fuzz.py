"""Bytes and texts from anyone: read, or refused with an error of ours, and nothing else.

``FUZZ_EXAMPLES=20000 pytest tests/tools/test_fuzz.py`` tries a thousand times as many.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from helpers.finetuning import small_trainer, take_steps
from helpers.jobs import job_of
from helpers.models import ModelCase, build
from mhacut.budget import RESOURCES, Budget
from mhacut.checkpoint.files import read_file_header, read_tensors
from mhacut.checkpoint.folder import open_folder
from mhacut.checkpoint.identity import checked_model_args, checked_pretrained_cfg
from mhacut.checkpoint.record import SlimRecord
from mhacut.checkpoint.training import read_training
from mhacut.commands.prune_calibration import METADATA_KEY, _flat, check_run, fingerprint_of, read_calibration
from mhacut.errors import CheckpointError, DataError, MhacutError, UsageError
from mhacut.finetuning.folder import RunFolder
from mhacut.options.option import key_value, read_config
from mhacut.options.prune import PruneOptions
from mhacut.pruning.job import Job

few = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "20")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SAFE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


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


def torch_bytes(zipped: bool) -> bytes:
    buffer = io.BytesIO()
    state = {"state_dict": SAFE, "args": {"model": "vit_tiny_patch16_224"}, "epoch": 3}
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def slim_document() -> dict:
    unit = {"layer": "blocks.0.mlp", "kind": "hidden", "dense_width": 8, "kept": [[0, 5, 7]]}
    sizes = {"input_size": [3, 32, 32], "mean": [0.5], "std": [0.5], "interpolation": "bicubic"}
    return {
        "format_version": 1,
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"num_classes": 10},
        "pretrained_cfg": {},
        "plan": [unit],
        "layers": {"blocks.0.mlp": {"hidden_width": 3}},
        "basis": "channel",
        "preprocessing": {**sizes, "crop_pct": 0.9, "crop_mode": "center"},
        "history": [{"command": "prune"}],
    }


def safetensors_bytes() -> bytes:
    entries = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    entries["b"] = {"dtype": "F16", "shape": [2, 1], "data_offsets": [8, 12]}
    text = json.dumps({"__metadata__": {"mhacut": "{}"}, **entries}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(12)


FILES = {"safetensors": safetensors_bytes(), "zip": torch_bytes(True), "legacy": torch_bytes(False)}


@st.composite
def changed(draw, whole: bytes) -> bytes:
    """Some bytes replaced, cut out, repeated or put in."""
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


def read(path, content: bytes) -> None:
    """Read a file to its end, or have it refused."""
    path.write_bytes(content)
    with refused_only_as(CheckpointError, str(path)):
        header = read_file_header(path)
        read_training(header.training)
        assert read_tensors(header).keys() == header.tensors.keys()


@pytest.mark.parametrize("kind", FILES)
@few
@given(data=st.data())
def test_damaged_files(tmp_path, kind, data):
    read(tmp_path / "model", data.draw(changed(FILES[kind])))


@few
@given(
    header=values | st.dictionaries(
        st.text(max_size=8) | st.just("__metadata__"),
        values | st.fixed_dictionaries({
            "dtype": st.sampled_from(["F32", "F16", "I64", "F8_E4M3", "BOOL", "x"]) | values,
            "shape": st.lists(st.integers(-2, 2**64), max_size=3) | values,
            "data_offsets": st.lists(st.integers(-2, 2**65), max_size=3) | values,
        }),
        max_size=4,
    ),
    size=st.none() | st.integers(0, 2**64 - 1),
    rest=st.binary(max_size=32),
)  # fmt: skip
def test_headers_of_safetensors(tmp_path, header, size, rest):
    text = json.dumps(header).encode()
    read(tmp_path / "model", struct.pack("<Q", len(text) if size is None else size) + text + rest)


KEYS = st.sampled_from(["state_dict", "model", "args", "config", "a.b", "c.d"]) | st.integers()
TENSORS = st.sampled_from(
    [torch.ones(2), torch.ones(2, 3).t(), torch.ones(1).cfloat(), torch.ones(3).to_sparse()]
)
SAVED = st.recursive(
    values | st.binary(max_size=8) | TENSORS | st.sampled_from([torch.Size([1]), torch.float32]),
    lambda inner: st.tuples(inner) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@few
@given(value=SAVED)
def test_whatever_torch_saves(tmp_path, value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    read(tmp_path / "model", buffer.getvalue())


OPCODES = [bytes([code]) for code in range(256)]
GLOBALS = (
    b"collections\nOrderedDict",
    b"torch._utils\n_rebuild_tensor_v2",
    b"yacs.config\nCfgNode",
    b"collections\ndefaultdict",
    b"numpy\ndtype",
    b"os\nsystem",
)
PHRASES = [b"}q\x00", b"X\x01\x00\x00\x00a", b"\x85R", b"K\x01", *(b"c%b\n" % name for name in GLOBALS)]


@few
@given(content=st.lists(st.sampled_from([*OPCODES, *PHRASES * 8]), max_size=40))
def test_any_pickle(tmp_path, content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02" + b"".join(content) + b".")
        archive.writestr("m/version", b"3\n")
    read(tmp_path / "model", buffer.getvalue())


def replace_some(data, document: dict, others: st.SearchStrategy) -> None:
    """Put other values in up to two places of a document, however deep."""
    for _ in range(data.draw(st.integers(0, 2))):
        place, key = document, data.draw(st.sampled_from(sorted(document, key=str)))
        while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
            place = place[key]
            keys = sorted(place, key=str) if isinstance(place, dict) else range(len(place))
            key = data.draw(st.sampled_from(list(keys)))
        place[key] = data.draw(others)


@few
@given(data=st.data())
def test_records_of_slim_files(data):
    document = slim_document()
    replace_some(data, document, values)
    text = data.draw(st.just(json.dumps(document)) | changed(json.dumps(document).encode()).map(
        lambda content: content.decode(errors="replace")))  # fmt: skip
    with refused_only_as(CheckpointError, ""):
        record = SlimRecord.from_json(text)
        assert SlimRecord.from_json(record.to_json()) == record


@few
@given(config=values, args=values, cfg=values)
def test_configurations(tmp_path, config, args, cfg):
    for check, value in ((checked_model_args, args), (checked_pretrained_cfg, cfg)):
        if isinstance(value, dict):
            with refused_only_as(CheckpointError, ""):
                assert json.loads(json.dumps(check(value))) is not None
    (tmp_path / "model.safetensors").write_bytes(FILES["safetensors"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused_only_as(CheckpointError, "config.json"):
        assert open_folder(tmp_path).config == config


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
YAML = st.lists(st.sampled_from([*MARKS, *WORDS]) | st.text(max_size=3), max_size=30).map("".join)


@few
@given(text=YAML | values.map(json.dumps))
def test_yaml(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with refused_only_as(UsageError, "run.yaml"):
        assert set(read_config(path, PruneOptions.options(), "run.yaml")) <= set(PruneOptions.options())


@few
@given(
    text=st.text(max_size=12) | st.from_regex(r"[0-9.,eE+-]{0,8}([KMGT]i?B?|%|B)?", fullmatch=True),
    resource=st.sampled_from(RESOURCES),
    dense=st.integers(1, 10**15),
)
def test_budgets(text, resource, dense):
    with refused_only_as(UsageError, "is not a budget", "more than the model has"):
        amount = Budget.parse(text, resource).amount(dense)
        assert isinstance(amount, int)
        assert amount >= 0


@few
@given(text=st.text(max_size=30) | st.text("[(1,2)]{}:'\"a=-.", max_size=40).map("a=".__add__))
def test_pairs(text):
    with refused_only_as(MhacutError, ""):
        key, value = key_value("--model-arg", text)
        assert key.isidentifier()
        checked_model_args({key: value})


def test_seeds_are_read(tmp_path):
    """Or nothing above would reach what it is to reach."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    read(tmp_path / "zip", FILES["zip"])
    assert set(read_tensors(read_file_header(tmp_path / "zip"))) == set(SAFE)
    assert SlimRecord.from_json(json.dumps(slim_document())).plan.units
    RunFolder(tmp_path).write_state(state_of_a_run())
    assert RunFolder(tmp_path).read_state() is not None
    job, tensors, document = calibrated_job()
    (tmp_path / "kept").write_bytes(save(tensors, {METADATA_KEY: json.dumps(document)}))
    check_run(tmp_path / "kept", read_calibration(tmp_path / "kept", document["fingerprint"], job), job)


def state_of_a_run() -> dict:
    """What a small run saves after its fourth step."""
    trainer = small_trainer()
    take_steps(trainer, 0, 4)
    return {"trainer": trainer.state_dict()}


@few
@given(data=st.data())
def test_damaged_states_of_runs(tmp_path, data):
    run = RunFolder(tmp_path)
    run.write_state(state_of_a_run())
    state = tmp_path / "state.pt"
    state.write_bytes(data.draw(changed(state.read_bytes())))
    with refused_only_as(CheckpointError, str(tmp_path)):
        small_trainer().load_state_dict(run.read_state()["trainer"])


@cache
def calibrated_job() -> tuple[Job, dict[str, torch.Tensor], dict]:
    """A job, and the tensors and the document of its calibration."""
    args = {"depth": 1, "embed_dim": 16, "num_heads": 2, "img_size": 32, "num_classes": 3}
    torch.manual_seed(0)
    job = job_of(build(ModelCase("vit_tiny_patch16_224", args)), torch.randn(3, 3, 32, 32))
    tensors, document = _flat(job.calibrate())
    return job, tensors, {"fingerprint": fingerprint_of(job), **document}


SHAPES = st.lists(st.integers(0, 3), max_size=3)


def calibrate(path, content: bytes) -> None:
    """Read a calibration, or have it refused."""
    path.write_bytes(content)
    job, _, document = calibrated_job()
    with refused_only_as(DataError, f"{path}: is not a calib", f"{path}: was made under other conditions"):
        found = read_calibration(path, document["fingerprint"], job)
        check_run(path, found, job)
        assert list(found.moments) == [unit.key for unit in job.units]


@few
@given(data=st.data())
def test_damaged_calibrations(tmp_path, data):
    _, tensors, document = calibrated_job()
    content = save(tensors, {METADATA_KEY: json.dumps(document)})
    size = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        content = data.draw(changed(content))
    else:
        header = data.draw(changed(content[8:size]))
        content = struct.pack("<Q", len(header)) + header + content[size:]
    calibrate(tmp_path / "kept.safetensors", content)


@few
@given(data=st.data())
def test_calibrations(tmp_path, data):
    _, tensors, document = calibrated_job()
    document = json.loads(json.dumps(document))
    replace_some(data, document, values)
    if data.draw(st.booleans()):
        tensors = {**tensors, data.draw(st.sampled_from(sorted(tensors))): torch.zeros(data.draw(SHAPES))}
    calibrate(tmp_path / "kept.safetensors", save(tensors, {METADATA_KEY: json.dumps(document)}))


FUZZER = Path(__file__).parents[2] / "tests" / "tools" / "fuzz.py"
SEEDS = """
import sys
from contextlib import nullcontext
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

sys.modules["atheris"] = SimpleNamespace(instrument_imports=lambda **_: nullcontext())
fuzzer = run_path(sys.argv[1])
for name, target in fuzzer["TARGETS"].items():
    fuzzer["seeds"](name, Path(name))
    for seed in Path(name).iterdir():
        target(seed.read_bytes())
        print(name)
"""


@pytest.mark.slow
def test_the_fuzzer_begins_with_inputs_that_are_read(programs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = programs.run(SEEDS, FUZZER)
    assert done.stderr == ""
    targets = "header torch torch pickle yacs record yaml state calibration"
    assert done.stdout.split() == targets.split()
