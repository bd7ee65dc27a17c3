"""Bad inputs through the command line: refused with what to do, nothing written, the input untouched.

Outputs are in test_bad_outputs.py.
"""

from __future__ import annotations

import io
import json
import os
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.checkpoints import Hostile, torch_file, zipped
from helpers.cli import FAST, refusal, run, unchanged
from helpers.data import lying_png, write_split
from mhacut.checkpoint.load import open_checkpoint
from mhacut.checkpoint.record import METADATA_KEY


def header(document: object, data: bytes = b"") -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def torchscript() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), buffer)
    return buffer.getvalue()


def quantised() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates them
        return torch_file({"a": torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)})


ONE = {"a": entry()}
BOMB = {"m/data.pkl": b"\x80\x02N.", "m/data/0": bytes(10**6)}
TENSOR = torch.ones(2)
DAMAGED = "truncated or damaged ("
NO_CHECKPOINT = "not a safetensors or PyTorch checkpoint: begins with b"
QUANTISED = "sparse and complex weights are not supported"
FILES = {
    "3 empty": (b"", "file is empty (0 bytes)"),
    "5 cut in the header": (struct.pack("<Q", 5000) + b"{}", DAMAGED),
    "6 cut in the data": (header(ONE, b"1234"), DAMAGED),
    "7 trailing bytes": (header(ONE, b"0" * 11), DAMAGED),
    "8 header of 2^63 bytes": (struct.pack("<Q", 2**63) + b"{}", NO_CHECKPOINT),
    "9 git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run git lfs pull"),
    "10 JSON": (b'{"a": {"weight_map": {}}}', NO_CHECKPOINT),
    "13 text": (b"just some text, too long to be small", NO_CHECKPOINT),
    "14 truncated zip": (torch_file({"a": TENSOR})[:-99], "damaged, or not a PyTorch checkpoint"),
    "15 plain zip": (zipped({"../evil.txt": b"x"}), "an uncompressed zip file with 1 data.pkl"),
    "16 TorchScript": (torchscript, "an uncompressed zip file with 1 data.pkl"),
    "18 pickled model": (lambda: torch_file(nn.Linear(2, 2)), "other than weights (torch.nn.modules.linear"),
    "18 protocol 4": (b"\x80\x04garbage", "objects other than weights"),
    "19 numpy arrays": (torch_file({"a": TENSOR, "best": np.ones(3)}), "other than weights (numpy"),
    "20 zip bomb": (zipped(BOMB, zipfile.ZIP_DEFLATED), "an uncompressed zip file with 1 data.pkl"),
    "20 large pickle": (zipped({"m/data.pkl": bytes(2**23 + 1)}), "its pickle is larger than 8388608 bytes"),
    "21 overlap": (header({**ONE, "b": entry(offsets=(4, 12))}, b"0" * 12), DAMAGED),
    "21 overflow": (header({"a": entry(shape=(2**40, 2**40))}), DAMAGED),
    "21 unknown dtype": (header({"a": entry("X9")}), DAMAGED),
    "21 deep": (header(b'{"a":' * 100_000), DAMAGED),
    "24 names": (header({"\x1b[2J\u202e[red]": entry("F8_E4M3", (8,))}, bytes(8)), r"\x1b[2J\u202e[red]"),
    "34 no tensors": (header({}), "holds no tensors"),
    "34 list": (torch_file([TENSOR]), "expected a dict of tensors, found list"),
    "34 nothing": (torch_file({"state_dict": None}), "expected a dict of tensors, found None"),
    "34 numbers": (torch_file({1: TENSOR}), "expected tensor names, found key 1"),
    "35 number": (torch_file({"a": TENSOR, "epoch": 3}), "'epoch': expected a tensor, found int"),
    "40 float8": (header({"a": entry("F8_E4M3", (8,))}, bytes(8)), QUANTISED),
    "40 complex": (torch_file({"a": TENSOR.cfloat()}), QUANTISED),
    "40 quantised": (quantised, "PyTorch checkpoint of dense float tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_checkpoints(tmp_path, case):
    content, says = FILES[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content() if callable(content) else content)
    for command in ("inspect", path), ("prune", path, "--flops", "50%", "-o", tmp_path / "out.safetensors"):
        message = refusal(tmp_path, *command)
        assert message.startswith(f"error: {path}: ")
        assert says in message
        assert message.count("\n") == 1


def test_paths_that_are_no_files(tmp_path, tiny_vit):  # 1, 2, 4
    def prune(name):
        return refusal(tmp_path, "prune", tmp_path / name, "--flops", "50%", "-o", tmp_path / "o.safetensors")

    assert f"no such file: {tmp_path / 'none'}" in prune("none")
    folder = tmp_path / "dir.safetensors"
    folder.mkdir()
    assert "has no config.json" in prune(folder.name)
    (folder / "model.safetensors").write_bytes(tiny_vit.path.read_bytes())
    assert "Give model.safetensors itself and --model NAME" in prune(folder.name)
    os.mkfifo(tmp_path / "fifo")
    assert "file is empty" in prune("fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "it is a link to a missing file" in prune("loop")


def test_code_in_a_pickle_is_named_not_run(tmp_path):  # 17
    path = tmp_path / "model.pth"
    path.write_bytes(torch_file({"a": TENSOR, "b": Hostile(os.mkdir, str(tmp_path / "ran"))}))
    assert "mkdir). They could run code, so nothing was loaded" in refusal(tmp_path, "inspect", path)


def stating(slim: Path, path: Path, change) -> Path:
    """A copy of a slim file that states something else."""
    document = json.loads(open_checkpoint(slim).header.metadata[METADATA_KEY])
    change(document)
    save_file(load_file(slim), path, {METADATA_KEY: json.dumps(document)})
    return path


LIES = {
    "26 index": (lambda d: d["plan"][0]["kept"][0].append(10**6), "must lie in 0..15"),
    "26 heads": (lambda d: d["model_args"].update(num_heads=10**9), "num_heads=1000000000"),
    "26 depth": (lambda d: d["model_args"].update(depth=10**6), "is far too large for the tensors"),
    "27 module": (lambda d: d.update(architecture="os.system"), "expected the name of a timm model"),
    "27 class": (lambda d: d["model_args"].update(norm_layer="os.system"), "norm_layer"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LIES)
def test_metadata_that_lies(slim, tmp_path, case):
    change, says = LIES[case]
    path = stating(slim, tmp_path / "slim.safetensors", change)
    message = refusal(tmp_path, "prune", path, "--flops", "50%", "-o", tmp_path / "out.safetensors")
    assert message.startswith(f"error: {path}: ")
    assert says in message


HOSTILE = "</script><script>x()</script>\x1b[2J\r\n\u202e[a](javascript:x)" + 5000 * "y"


def hostile(slim: Path, path: Path) -> Path:
    """A slim file that states hostile text wherever text may be anything."""

    def change(document):
        entry = {**document["history"][0], "data": HOSTILE, "seed": HOSTILE, "license": HOSTILE}
        entry |= {"accuracy": {"top1_before": HOSTILE}, "versions": {"mhacut": HOSTILE}, HOSTILE: HOSTILE}
        entry["fidelity"] = {"divergence": 0.1, "images": HOSTILE, "sample": HOSTILE}
        document["history"] = [entry]
        document["pretrained_cfg"] |= {"license": HOSTILE, "label_names": [HOSTILE] * 7}

    return stating(slim, path, change)


def exported(slim: Path, path: Path, format: str) -> Path:
    """What ``export`` makes of the file of :func:`hostile`, which lies beside it."""
    source = hostile(slim, path.with_name("hostile.safetensors"))
    result = run("export", source, "--format", format, "-o", path)
    assert result.exit_code == 0, result.stderr
    return path


@pytest.mark.slow
def test_what_a_history_says_gets_into_no_page_and_no_card(slim, tmp_path):  # 24
    exported(slim, tmp_path / "out", "timm")
    reported = run("inspect", tmp_path / "hostile.safetensors", "--html", tmp_path / "page.html")
    assert reported.exit_code == 0, reported.stderr
    for text in ((tmp_path / "out" / "README.md").read_text(), (tmp_path / "page.html").read_text()):
        assert all(char == "\n" or char.isprintable() for char in text)
        assert "<script>x()" not in text
    assert "javascript" not in (tmp_path / "out" / "README.md").read_text()


def test_models_that_are_not_meant(tiny_vit, tmp_path):  # 28 to 32, 37
    def inspect(tensors, *flags):
        save_file(tensors, tmp_path / "model.safetensors")
        return refusal(tmp_path, "inspect", tmp_path / "model.safetensors", *flags)

    own, flags = load_file(tiny_vit.path), tiny_vit.flags[1:]
    message = inspect(own, "--model", "vit_tiny_patch16_225")
    assert "timm has no model 'vit_tiny_patch16_225'; did you mean vit_tiny_patch16_224" in message
    convolutions = {"conv1.weight": torch.zeros(64, 3, 7, 7)}
    assert "tensors do not fit resnet18" in inspect(convolutions, "--model", "resnet18")
    missing = dict(own)
    del missing["norm.weight"]
    message = inspect({**missing, "extra": TENSOR}, *flags)
    assert "1 missing, 1 unexpected, 0 of another shape" in message
    assert "'norm.weight'" in message
    message = inspect({name: tensor for name, tensor in own.items() if "blocks.1" not in name}, *flags)
    assert "12 missing" in message
    smaller = {**own, "blocks.0.attn.qkv.weight": torch.ones(100, 48)}
    assert "expected [144, 48], found [100, 48]" in inspect(smaller, *flags)
    assert "img_size" in inspect(own, *flags, "--model-arg", "img_size=64")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(tiny_vit, tmp_path, value):  # 38
    tensors = load_file(tiny_vit.path)
    tensors["blocks.1.attn.proj.bias"][3:5] = value
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    message = refusal(
        tmp_path,
        "prune",
        path,
        *tiny_vit.flags[1:],
        "--flops",
        "50%",
        "-o",
        tmp_path / "o.safetensors",
        *FAST,
    )
    assert "1 tensors hold NaN or infinite values: 'blocks.1.attn.proj.bias' (2 of 48)" in message


@pytest.mark.slow
def test_odd_files_that_are_sound(tiny_vit, tmp_path):  # 12, 32, 33, 36, 39, 41, 43
    """Wrapped, with a prefix, in mixed dtypes, tied, strided, under the wrong suffix; then pruned again."""
    own = load_file(tiny_vit.path)
    tied = own["blocks.0.norm1.weight"].half()
    odd = {f"module.{name}": tensor.half() if "blocks.0" in name else tensor for name, tensor in own.items()}
    odd |= {"module.blocks.0.norm1.weight": tied, "module.blocks.0.norm2.weight": tied}
    odd["module.head.weight"] = own["head.weight"].t().contiguous().t().bfloat16()
    path = tmp_path / "odd.safetensors"
    torch.save({"state_dict": odd, "epoch": 3}, path)
    before = path.read_bytes()
    out, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    result = run("prune", path, *tiny_vit.flags[1:], "--flops", "80%", "-o", out, *FAST)
    assert result.exit_code == 0, result.stderr
    for note in ("state_dict", "module.", "num_classes 7"):
        assert note in result.stderr
    stored = load_file(out)
    assert stored["blocks.0.attn.qkv.weight"].dtype == torch.float16
    assert stored["norm.weight"].dtype == torch.float32
    assert stored["head.weight"].dtype == torch.bfloat16
    result = run("prune", out, "--flops", "90%", "-o", again, *FAST)
    assert result.exit_code == 0, result.stderr
    assert len(open_checkpoint(again).record.history) == 2
    assert path.read_bytes() == before
    again.rename(tmp_path / "again.pth")
    result = run("inspect", tmp_path / "again.pth")
    assert result.exit_code == 0, result.stderr


def evaluate(slim: Path, folder: Path, *more: object) -> str:
    return refusal(folder, "evaluate", slim, "--data-dir", folder, "-j", "0", *more)


def test_folders_of_images_that_are_not_meant(slim, tmp_path):  # 51 to 53
    assert "no such directory (--data-dir)" in refusal(
        tmp_path, "evaluate", slim, "--data-dir", tmp_path / "none"
    )
    classes = [f"class{number}" for number in range(7)]
    write_split(tmp_path / "train", classes, 1)
    assert "no split 'val'; folders there: train. Choose one with --val-split" in evaluate(slim, tmp_path)
    write_split(tmp_path / "val", classes[:6], 1)
    assert "6 class folders" in evaluate(slim, tmp_path)
    (tmp_path / "val" / "class6").mkdir()
    message = evaluate(slim, tmp_path)
    assert "class folders without images: class6. " in message
    assert "--class-map" in message


def test_images_that_cannot_be_read(slim, tmp_path):  # 54
    classes = [f"class{number}" for number in range(7)]
    write_split(tmp_path / "val", classes, 1)
    whole = (tmp_path / "val" / "class0" / "0.png").read_bytes()
    bad = {
        "cut.png": whole[: len(whole) // 2],
        "text.jpg": b"no image",
        "huge.png": lying_png(60_000, 60_000),
        "lies.png": lying_png(8_000, 8_000),
    }
    for name, content in bad.items():
        (tmp_path / "val" / "class0" / name).write_bytes(content)
    message = evaluate(slim, tmp_path)
    assert "4 of 11 images cannot be read" in message
    Image.new("CMYK", (40, 40)).save(tmp_path / "val" / "class1" / "cmyk.jpg")
    Image.new("P", (40, 40)).save(tmp_path / "val" / "class1" / "palette.png")
    Image.new("I;16", (40, 40)).save(tmp_path / "val" / "class1" / "16 bits.png")
    for name in bad:
        (tmp_path / "val" / "class0" / name).unlink()
    result = run("evaluate", slim, "--data-dir", tmp_path, "-j", "0", "--json")
    assert json.loads(result.stdout)["images"] == 10


def test_a_device_that_is_not_there(slim, images, tmp_path):  # 55
    if torch.cuda.is_available():
        pytest.skip("it is there")
    message = refusal(tmp_path, "evaluate", slim, "--data-dir", images, "--device", "cuda")
    assert "--device cuda: this machine has no usable CUDA GPUs; use auto or cpu" in message


def test_narrow_terminals_and_odd_names(slim, tmp_path):  # 58
    path = tmp_path / "a [red] \u6f22.safetensors"
    path.write_bytes(slim.read_bytes())
    with unchanged(path):
        result = run("inspect", path, env={"COLUMNS": "20"})
        assert result.exit_code == 0, result.stderr
        assert result.stdout == run("inspect", path).stdout
    missing = refusal(tmp_path, "inspect", tmp_path / os.fsdecode(b"no [red] \xff"))
    assert "no [red] \ufffd" in missing
    path.rename(tmp_path / os.fsdecode(b"[red] \xff.safetensors"))
    message = refusal(tmp_path, "inspect", tmp_path / os.fsdecode(b"[red] \xff.safetensors"))
    assert "[red] \ufffd.safetensors: truncated or damaged (" in message
