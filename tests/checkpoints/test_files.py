"""Files that are not what they seem: each is refused, says what it looks like, and runs nothing."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import PosixPath

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

from helpers.checkpoints import Hostile
from mhacut.checkpoint import torch_file
from mhacut.checkpoint.files import read_file_header, read_tensors, sha256_of
from mhacut.checkpoint.training import read_training
from mhacut.errors import CheckpointError

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.safetensors"
    save_file(TENSORS, path, {"format": "pt", "note": "hello"})
    return path


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_file_header(path)
    message = str(error.value)
    assert str(path) in message
    return message


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


EXPLAINS = tuple(map(int, safetensors.__version__.split(".")[:2])) >= (0, 8)
"""Whether the library says in words what is wrong with a header."""
TWICE = json.dumps({"a": entry(), "b": entry()}).replace('"b"', '"a"')


def test_a_safetensors_file_is_read(good):
    header = read_file_header(good)
    assert header.format == "safetensors"
    assert {name: info.shape for name, info in header.tensors.items()} == {"a.weight": (2, 3), "b": (2,)}
    assert header.tensors["b"].dtype == torch.float16
    assert header.metadata["note"] == "hello"
    tensors = read_tensors(header)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


def test_sha256_is_that_of_the_bytes(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "file is empty (0 bytes)"),
        (b"abc", "3 bytes are too few"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run git lfs pull"),
        (b"\n <!DOCTYPE html><html>", "this is an HTML page"),
        (b'{"a": {"weight_map": {}}}', "this is JSON text"),
        (b"\x93NUMPY\x01\0v\0{'descr': '<f4'}", "this is a NumPy array (.npy), not a checkpoint; convert it"),
        (b"\x89HDF\r\n\x1a\n\0\0\0", "this is an HDF5 file (.h5), as Keras writes them, not a checkpoint;"),
        (b"GGUF\x03\0\0\0\0\0", "this is a GGUF file, not a checkpoint; give the safetensors or torch"),
        (b"\x08\x08\x12\x07pytorch", "this is an ONNX model, not a checkpoint; give the safetensors or"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\xff", "this is compressed by gzip (.gz, .tgz), not a checkpoint; unpack"),
        (b"\xfd7zXZ\0\0\0\0\0", "this is compressed (.bz2, .xz, .zst), not a checkpoint; unpack it, and"),
        (b"just some text, too long to be small", "not a checkpoint: neither safetensors nor a torch file"),
        (struct.pack("<Q", 2**63) + b"{}", "header would be 9223372036854775808 bytes"),
        (struct.pack("<Q", 5000) + b"{}", "the header says 5000 bytes, the file has 2"),
        (safetensors_bytes({"a": entry()}, b"1234"), "truncated: 4 of 8 bytes of weights"),
        (safetensors_bytes({"a": entry()}, b"0" * 11), "3 unexpected bytes after the last tensor"),
        (safetensors_bytes({}), "holds no tensors"),
        (safetensors_bytes(dict.fromkeys(range(100_001), entry())), "100001 tensors, expected at most"),
        (safetensors_bytes('{"a": 1'), "damaged safetensors header (invalid JSON in header: EOF"),
        (safetensors_bytes('{"a"' + ":{'" * 9), "invalid JSON"),
        (safetensors_bytes('{"a":' * 100_000), "recursion limit exceeded"),
        (struct.pack("<Q", 3) + b'{"\xff', "invalid UTF-8"),
        (safetensors_bytes(TWICE, b"0" * 16), "8 unexpected bytes after the last tensor"),
        (safetensors_bytes({"a": entry(offsets=(0, 4))}, b"0" * 4), "invalid shape, data type, or offset"),
        (safetensors_bytes({"a": entry(shape=(-2,))}), "invalid value: integer `-2`, expected usize"),
        (safetensors_bytes({"a": entry(shape=(2**63,))}), "overflow computing buffer size from shape"),
        (safetensors_bytes({"a": entry(shape=(True,))}), "boolean `true`, expected usize"),
        (safetensors_bytes({"a": entry(shape=(2**40, 2**40))}), "overflow computing buffer size from shape"),
        (safetensors_bytes({"a": entry(offsets=(-8, 0))}), "invalid value: integer `-8`, expected usize"),
        (safetensors_bytes({"a": entry(), "b": entry(offsets=(4, 12))}, b"0" * 12), "offset for tensor `b`"),
        (safetensors_bytes({"a": entry(), "b": entry(offsets=(9, 17))}, b"0" * 17), "offset for tensor `b`"),
        (safetensors_bytes({"\x1b[2J\u202e": entry(offsets=(4, 12))}, b"0" * 12), "tensor `\\x1b[2J\\u202e`"),
        (safetensors_bytes({"a": [1]}), "invalid type: integer `1`, expected"),
        (safetensors_bytes({"a": entry("F8_E4M3", (8,))}, b"0" * 8), "quantised or complex weights"),
        (safetensors_bytes({"a": entry("U16", (4,))}, b"0" * 8), "found U16, expected a float dtype"),
        (safetensors_bytes({"a": entry("C64", (1,))}, b"0" * 8), "found C64, expected a float dtype"),
        (safetensors_bytes({"a": entry("X9")}, b"0" * 8), "unknown variant `X9`, expected one of `BOOL`"),
        (safetensors_bytes({"__metadata__": {"a": 1}}), "invalid type: integer `1`, expected a string"),
        (safetensors_bytes({"a\x1b[2J\u202e": entry("C64", (1,))}, b"0" * 8), "'a\\x1b[2J\\u202e'"),
    ],
)  # fmt: skip
def test_bad_bytes_say_what_they_look_like(tmp_path, content, says):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    message = refusal(path)
    if EXPLAINS or "damaged safetensors header (" not in message:
        assert says in message


def test_every_truncation_of_a_file_is_refused(good):
    content = good.read_bytes()
    for size in range(len(content)):
        good.write_bytes(content[:size])
        refusal(good)


def test_what_is_not_a_file_is_refused_without_opening_it(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.safetensors")
    os.mkfifo(tmp_path / "fifo")
    assert "not a regular file" in refusal(tmp_path / "fifo")
    assert "not a regular file" in refusal("/dev/null")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot be opened" in refusal(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    assert "a link to a missing file" in refusal(tmp_path / "dangling")


def test_a_folder_needs_timms_config(tmp_path, good):
    folder = tmp_path / "folder"
    folder.mkdir()
    assert refusal(folder).endswith("without a config.json")
    shard = "model-00001-of-00002.safetensors"
    beside = [
        "state.pt",
        "state-best.pt",
        "summary.csv",
        "scaler.pt",
        "sampler_1.bin",
        "rng_state_0.pth",
        "weights-00001-of-00002.bin",
    ]
    for name in (*beside, "best.safetensors", "last.safetensors"):
        (folder / name).touch()
    assert refusal(folder).endswith("give one of the files that it holds: best.safetensors, last.safetensors")
    (folder / "checkpoint.pth.tar").touch()
    assert "best.safetensors, checkpoint.pth.tar, last.safetensors" in refusal(folder)
    good.rename(folder / "model.safetensors")
    (folder / shard).touch()
    assert "it holds model.safetensors: give that file, and model='NAME'" in refusal(folder)
    config = folder / "config.json"
    config.write_text('{"architecture": "vit_tiny_patch16_224", "architecture": "x"}')
    with pytest.raises(CheckpointError, match=r"config.json: key 'architecture' appears twice"):
        read_file_header(folder)
    config.write_text('{"architecture": "vit_tiny_patch16_224"}')
    assert read_file_header(folder).config == {"architecture": "vit_tiny_patch16_224"}
    config.write_text('{"architecture": "a"}', encoding="utf-8-sig")
    assert read_file_header(folder).config == {"architecture": "a"}
    for name in ("model.safetensors", shard):
        (folder / name).unlink()
    assert "holds no weights" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    assert "the files that model.safetensors.index.json lists are missing" in refusal(folder)


@pytest.mark.parametrize("config", [True, False], ids=["config", "bare"])
@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            [".metadata", "__0_0.distcp"],
            "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pth",
        ),
        (["latest", "global_step9/mp_rank_00_model_states.pt"], "python zero_to_fp32.py . OUTPUT, and give"),
        (["zero_to_fp32.py"], "of a run without ZeRO-3, give global_stepN/mp_rank_00_model_states.pt"),
    ],
)
def test_folders_of_distributed_training_say_how_to_convert(tmp_path, files, says, config):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    if config:
        (tmp_path / "config.json").write_text("{}")
    assert says in refusal(tmp_path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("checkpoint", "part", "stripped"),
    [
        (TENSORS, None, False),
        ({"module." + name: tensor for name, tensor in TENSORS.items()}, None, True),
        (
            {"model": {"_orig_mod." + name: tensor for name, tensor in TENSORS.items()}, "epoch": 3},
            "model",
            True,
        ),
        ({"state_dict": TENSORS, "model": {}}, "state_dict", False),
        (
            {"model": TENSORS, "args": argparse.Namespace(lr=1e-3), "optimizer": {"m": [torch.ones(3)]}},
            "model",
            False,
        ),
        ({"state_dict": {}, "model_ema": TENSORS}, "model_ema", False),
        ({"state_dict": TENSORS, "state_dict_ema": None}, "state_dict", False),
    ],
)
def test_torch_files_are_read_and_say_which_part(tmp_path, checkpoint, part, stripped, zipped):
    path = tmp_path / "model.pth"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    header = read_file_header(path)
    assert (header.format, header.part, bool(header.naming.prefixes)) == (
        "torch",
        part,
        stripped,
    )
    tensors = read_tensors(header)
    assert set(tensors) == set(TENSORS)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


def test_content_decides_not_the_suffix(tmp_path, good):
    torch.save(TENSORS, tmp_path / "torch.safetensors")
    header = read_file_header(tmp_path / "torch.safetensors")
    assert header.format == "torch"
    assert torch.equal(read_tensors(header)["b"], TENSORS["b"])
    header = read_file_header(good.rename(tmp_path / "good.pth"))
    assert header.format == "safetensors"
    assert torch.equal(read_tensors(header)["b"], TENSORS["b"])


@pytest.mark.parametrize(
    ("checkpoint", "says"),
    [
        ([torch.ones(1)], "expected a dict of tensors, found list"),
        (torch.ones(1), "expected a dict of tensors, found Tensor"),
        ({"state_dict": None}, "'state_dict' of the checkpoint: expected a dict of tensors, found None"),
        ({"model": 3}, "'model' of the checkpoint: expected a dict of tensors, found int"),
        ({1: torch.ones(1)}, "expected tensor names, found key 1"),
        ({"a": torch.ones(1), "epoch": 3}, "'epoch' is a int, expected a tensor"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, "complex weights are not supported, found complex64"),
        ({"a": torch.ones(1).to(torch.float8_e4m3fn)}, "found float8_e4m3fn"),
        ({"a": torch.ones(1).to_sparse()}, "sparse or complex weights are not supported"),
        ({"a": torch.ones(1).expand(10**9)}, "'a' claims 4000000000 bytes, the whole file has"),
        ({"a": torch.ones(1), "module.a": torch.ones(1)}, "two tensors have the same name"),
        ({}, "holds no tensors"),
    ],
)
def test_torch_files_without_a_state_dict_say_what_they_hold(tmp_path, checkpoint, says):
    path = tmp_path / "model.pth"
    torch.save(checkpoint, path)
    assert says in refusal(path)


@pytest.mark.parametrize("kind", ["adapter", "unmerged"])
def test_adapters_are_to_be_merged_first(tmp_path, kind):
    path = tmp_path / "adapter_model.safetensors"
    layer, name = "base_model.model.blocks.0.attn.qkv", "default." if kind == "unmerged" else ""
    tensors = {f"{layer}.lora_{one}.{name}weight": torch.ones(2, 2) for one in "AB"}
    if kind == "unmerged":
        tensors[f"{layer}.base_layer.weight"] = torch.ones(2, 2)
    save_file(tensors, path)
    assert "is a tensor of an adapter; merge it into its model first: merged = PeftModel" in refusal(path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "holds an adapter of PEFT and no whole model; merge it into its model first" in refusal(tmp_path)


def test_quantized_weights_are_no_damaged_file(tmp_path):
    path = tmp_path / "model.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates them
        torch.save({"a": torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)}, path)
    assert "quantized weights are not supported, expected float ones; give the checkpoint from" in refusal(
        path
    )


@pytest.mark.parametrize("how", ["zip", "legacy", "raw pickle"])
def test_code_in_a_pickle_is_not_run(tmp_path, how):
    target = tmp_path / "side_effect"
    path = tmp_path / "model.pth"
    checkpoint = {"a": torch.ones(1) if how != "raw pickle" else 1, "b": Hostile(os.mkdir, str(target))}
    if how == "raw pickle":
        path.write_bytes(pickle.dumps(checkpoint))
    else:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=how == "zip")
    message = refusal(path)
    assert "mkdir" in message
    assert "nothing was run" in message
    assert not target.exists()


def test_a_pickled_model_and_numpy_values_say_how_to_convert(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(nn.Linear(2, 2), path)
    assert "contains a pickled model" in refusal(path)
    assert "torch.save(c.state_dict()" in refusal(path)
    numpy = pytest.importorskip("numpy")
    torch.save({"state_dict": TENSORS, "best": numpy.float64(3.0), "all": numpy.ones(3)}, path)
    message = refusal(path)
    assert "numpy arrays beside the weights (numpy" in message
    assert ".scalar" not in message
    assert "save them as x.tolist()" in message


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("how", ["zip", "legacy", "bare pickle"])
def test_the_advice_for_a_pickled_model_loads_it(tmp_path, how, protocol):
    path, model = tmp_path / "model.pth", nn.Linear(2, 2)
    if how == "bare pickle":
        path.write_bytes(pickle.dumps(model, protocol))
    else:
        torch.save(model, path, pickle_protocol=protocol, _use_new_zipfile_serialization=how == "zip")
    advice = re.search(r"c = (.*?\)); torch.save", refusal(path)).group(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = eval(advice, {"torch": torch, "pickle": pickle, "open": open, "FILE": path})
    assert torch.equal(loaded.weight, model.weight)


@pytest.mark.parametrize("how", ["zip", "legacy", "bare pickle"])
def test_the_advice_for_pickles_of_another_protocol_makes_a_file_that_opens(tmp_path, how):
    path = tmp_path / "model.pth"
    if how == "bare pickle":
        path.write_bytes(pickle.dumps({"epoch": 1}, protocol=4))
    else:
        new = how == "zip"
        torch.save(TENSORS, path, pickle_protocol=4, _use_new_zipfile_serialization=new)
    advice = re.search(r"(torch.save\(.*), \"weights.pth\"\)$", refusal(path)).group(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eval(f"{advice}, NEW)", {"torch": torch, "pickle": pickle, "open": open, "FILE": path, "NEW": path})
    if how != "bare pickle":
        assert read_file_header(path).tensors.keys() == TENSORS.keys()


def beside_weights():
    numpy = pytest.importorskip("numpy")
    options = {"output": PosixPath("/tmp/run"), "model": "vit_tiny_patch16_224", "img_size": numpy.int64(32)}
    options |= {"mean": [numpy.float64(0.5)] * 3, "std": list(numpy.ones(3, ">f4")), "amp": numpy.bool_(True)}
    return {
        "best": numpy.float64(3.0),
        "scores": defaultdict(list, {"top1": [numpy.float32(81.5)]}),
        "counts": defaultdict(int, {"a": 1}),
        "text": numpy.str_("a"),
        "args": argparse.Namespace(**options),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_harmless_values_beside_the_weights_do_not_matter(tmp_path, zipped):
    path = tmp_path / "model.pth"
    torch.save({"model": TENSORS, **beside_weights()}, path, _use_new_zipfile_serialization=zipped)
    header = read_file_header(path)
    assert all(torch.equal(read_tensors(header)[name], tensor) for name, tensor in TENSORS.items())
    assert header.training["args"]["amp"] is True
    training = read_training(header.training)
    assert (training.model, training.side) == ("vit_tiny_patch16_224", 32)
    assert training.cfg == {"mean": [0.5, 0.5, 0.5], "std": [1.0, 1.0, 1.0], "input_size": [3, 32, 32]}
    torch.save({**TENSORS, **beside_weights()}, path, _use_new_zipfile_serialization=zipped)
    assert "'best' is a float, expected a tensor" in refusal(path)
    assert "pathlib" not in str(torch.serialization.get_safe_globals())


@pytest.mark.parametrize(
    "wrong",
    [
        defaultdict(os.getcwd),
        defaultdict(list, {"a": Hostile(os.mkdir, "side_effect")}),
        Hostile(PosixPath, Hostile(os.mkdir, "side_effect")),
        Hostile(dict, Hostile(os.mkdir, "side_effect")),
    ],
    ids=["factory", "inside", "path", "dict"],
)
def test_harmless_names_let_nothing_else_in(tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": TENSORS, "wrong": wrong}, tmp_path / "model.pth")
    message = refusal(tmp_path / "model.pth")
    assert "nothing was run" in message
    assert "pathlib" not in message
    assert not (tmp_path / "side_effect").exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("size", [4, 3_000_000], ids=["small", "large"])
def test_arrays_in_a_pickle_say_how_to_convert(tmp_path, size, protocol):
    numpy = pytest.importorskip("numpy")
    path = tmp_path / "model.pkl"
    arrays = {"model": {"a.weight": numpy.ones(size, "f4")}, "__author__": "somebody"}
    path.write_bytes(pickle.dumps(arrays, protocol))
    message = refusal(path)
    assert "numpy arrays in a pickle (as detectron2's .pkl), not a torch checkpoint" in message
    assert "torch.from_numpy(v)" in message


def test_zip_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "model.pth"

    def pack(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in members.items():
                archive.writestr(name, content)

    pack({"../evil.txt": b"x"})
    assert "a zip file, but not a torch checkpoint" in refusal(path)
    assert not (tmp_path.parent / "evil.txt").exists()
    pack({"embedding/kernel.npy": b"x", "cls.npy": b"x"})
    assert "a NumPy archive (.npz), not a torch checkpoint; timm converts those of its" in refusal(path)
    pack({"m/data.pkl": b"\x80\x02N.", "m/data/0": b"0" * 10**7}, zipfile.ZIP_DEFLATED)
    assert "compressed torch files are not supported" in refusal(path)
    pack({"m/data.pkl": b"x", "m/constants.pkl": b"x", "m/code/a.py": b"x"})
    assert "TorchScript archives are not supported" in refusal(path)
    several_disks = struct.pack("<4sLQL", b"PK\x06\x07", 1, 0, 2) + struct.pack("<4s18x", b"PK\x05\x06")
    path.write_bytes(b"\x80\x02" + several_disks)  # found by fuzzing
    pickled, message = "a pickle, but none that torch loads safely", refusal(path)
    assert (
        "zipfiles that span multiple disks are not supported" in message or pickled in message
    )  # Python 3.13
    path.write_bytes(b"\x80\x04garbage")
    assert pickled in refusal(path)
    path.write_bytes(b"\0" * 257 + b"ustar" + b"\0" * 250)
    assert "tar archive" in refusal(path)


def test_a_truncated_torch_file_is_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer)
    path = tmp_path / "model.pth"
    for size in (40, len(buffer.getvalue()) // 2, len(buffer.getvalue()) - 1):
        path.write_bytes(buffer.getvalue()[:size])
        assert "truncated, or not a torch checkpoint" in refusal(path)


def test_a_real_torchscript_archive_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), str(path))
    assert "TorchScript archives are not supported" in refusal(path)


def test_a_file_that_changed_after_its_header_was_read_is_refused(good):
    header = read_file_header(good)
    save_file({"a.weight": torch.ones(1)}, good)
    with pytest.raises(CheckpointError, match=r"cannot be read|changed while"):
        read_tensors(header)


@pytest.mark.parametrize("name", ["items", "values", "get", "keys"])
@pytest.mark.parametrize("outside", [False, True])
def test_dicts_with_an_attribute_in_the_place_of_a_method_are_refused(tmp_path, name, outside):
    class Shadowed:
        def __reduce__(self):
            return OrderedDict, (), {name: 1}, None, iter([("a", torch.ones(2))])

    tensors = Shadowed()
    path = tmp_path / "model.pth"
    torch.save({"model": tensors} if outside else tensors, path)
    assert f"a OrderedDict in it has an attribute {name!r} in the place of its own" in refusal(path)


def test_attributes_that_hide_nothing_are_none_of_our_business(tmp_path):
    class Numbered:
        def __reduce__(self):
            return OrderedDict, (), {1: 1}, None, iter([("a", torch.ones(2))])

    path = tmp_path / "model.pth"
    torch.save({"model": Numbered(), "args": argparse.Namespace(mro=1, items=2)}, path)
    assert list(read_file_header(path).tensors) == ["a"]


def test_each_value_is_looked_at_once_however_often_it_is_named():
    class Counted:
        looked = 0

        @property
        def __dict__(self):
            Counted.looked += 1
            return {}

    torch_file._check_attributes("file", [Counted()] * 1000 + [[value] for value in [Counted()] * 1000])
    assert Counted.looked == 2


def test_classes_beside_the_weights_have_their_own_attributes(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": {"a": torch.ones(2)}, "kind": OrderedDict}, path)
    assert list(read_file_header(path).tensors) == ["a"]


@pytest.mark.parametrize("name", ["numel", "element_size"])
def test_tensors_with_one_are_refused(tmp_path, name):
    tensor = nn.Parameter(torch.ones(2))
    tensor.__dict__[name] = 1
    torch.save({"a": tensor}, tmp_path / "model.pth")
    assert f"a Parameter in it has an attribute {name!r}" in refusal(tmp_path / "model.pth")
