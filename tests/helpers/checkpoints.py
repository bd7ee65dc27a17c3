"""A tiny ViT in a file, dense or slim, contents of other files, and how a file is refused."""

from __future__ import annotations

import io
import zipfile

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_data_config

from mhacut.checkpoint.load import read_model
from mhacut.checkpoint.record import SlimRecord
from mhacut.checkpoint.write import write_slim
from mhacut.errors import CheckpointError
from mhacut.plan import Plan
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.slice import cut


class Hostile:
    """A pickle of it calls ``function`` when it is read without care."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def torch_file(value: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


NAME = "vit_tiny_patch16_224"
ARGS = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


def tiny(name=NAME, **changes):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**ARGS, "num_classes": 10, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def save(model, path, **changes):
    save_file({**model.state_dict(), **changes}, path)
    return path


def under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def opened(path, content, **args):
    torch.save(content, path)
    return read_model(path, **args)


def logits_with(tensors):
    model = tiny()
    model.load_state_dict(tensors)
    with torch.no_grad():
        return model(IMAGES)


def make_slim(source, path, widths=None, **read_args):
    loaded = read_model(source, **read_args)
    widths = widths or {"qk": 5, "v": 11, "hidden": 77}
    units = find_prunable_layers(loaded.model).units()
    plan = Plan(tuple(unit.keep_first(widths[unit.kind]) for unit in units))
    preprocessing = resolve_data_config({}, model=loaded.model)
    cut(loaded.model, plan)
    record = SlimRecord(loaded.identity, plan, preprocessing, ({"command": "prune"},))
    write_slim(path, loaded.model, record, dtypes=loaded.dtypes, overwrite=False, input_path=loaded.path)
    return loaded.model, record


def refusal(source, **read_args) -> str:
    with pytest.raises(CheckpointError) as error:
        read_model(source, **read_args)
    return str(error.value)
