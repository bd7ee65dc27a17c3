"""Write a folder that timm opens, as ``local-dir:`` or from the hub, with a card that says what was cut."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.identity import OF_WEIGHTS, PROVENANCE
from mhacut.checkpoint.provenance import stated_license
from mhacut.checkpoint.write import slim_content
from mhacut.data import Preprocessing
from mhacut.errors import OutputError, option_name
from mhacut.exporting.card import model_card
from mhacut.exporting.runtimes import DTYPES, Runner
from mhacut.exporting.timm_model import NAME
from mhacut.options.export import ExportOptions
from mhacut.runtime.files import check_creatable, write_whole_folder
from mhacut.runtime.tensor_files import save_tensors
from mhacut.surgery.find import model_input_size

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
FILES = (WEIGHTS, CONFIG, CARD)


def check_folder(target: Path, *, overwrite: bool, input_path: Path | None) -> None:
    """Raise an :class:`OutputError` if the folder must not be written to.

    Args:
        target: the folder.
        overwrite: whether files in it may be replaced.
        input_path: the checkpoint, which is never replaced.
    """
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file; {option_name('format', 'timm')} writes a folder")
    if input_path is not None and target.is_dir():
        for place in (target, target / WEIGHTS):
            if place.exists() and input_path.exists() and place.samefile(input_path):
                raise OutputError(f"{target}: is the input, which is never overwritten; choose another name")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise OutputError(
            f"{target}: exists already; choose another name, or {option_name('overwrite', True)}"
        )
    check_creatable(Path(os.path.realpath(target)))


def write_folder(
    target: Path,
    loaded: Checkpoint,
    preprocessing: Preprocessing,
    options: ExportOptions,
    compare: Callable[[Runner], None],
) -> None:
    """Write a folder that timm opens: a new one whole or not at all, an old one file by file.

    Args:
        target: the folder; in an existing one, only files of the same names are replaced.
        loaded: the checkpoint, dense or slim.
        preprocessing: preprocessing of its images.
        options: options of the command; ``dtype``, ``license``, ``overwrite`` and ``push_to_hub`` are used.
        compare: called with a runner of the model as timm opens it; raises if its outputs differ.

    Raises:
        OutputError: it must not or cannot be written.
    """
    target = Path(os.path.realpath(target))
    model = _made_by_timm(loaded, options.license or stated_license(loaded))
    dtypes = dict.fromkeys(model.state_dict(), DTYPES[options.dtype])
    pushed_to = options.push_to_hub
    source = f"local-dir:{target.name}" if pushed_to is None else f"hf-hub:{pushed_to}"

    def fill(folder: Path) -> None:
        # timm's own writer decides what its reader finds. It writes no weights, neither as a pickle (False)
        # nor as safetensors (True): it cannot where a module has several names, or the disk is full.
        save_for_hf(model, str(folder), safe_serialization=cast(Any, None))
        if loaded.record is None:
            _save_plain(folder / WEIGHTS, model, DTYPES[options.dtype])
        else:
            slim_content(target, model, loaded.record, dtypes)(folder / WEIGHTS)
        card = model_card(source, loaded, preprocessing, options.license)
        (folder / CARD).write_text(card, encoding="utf-8")
        with torch.random.fork_rng(devices=[]):
            opened = timm.create_model(f"local-dir:{folder}", pretrained=True)
        opened = opened.eval().requires_grad_(False)
        compare(lambda images: opened(images))

    write_whole_folder(target, fill)


def _made_by_timm(loaded: Checkpoint, license: str | None) -> Any:
    """Build the model by timm's factory, which keeps the arguments that timm's writer needs."""
    identity, given = loaded.identity, dict(cast(Any, loaded.model).pretrained_cfg)
    for name in OF_WEIGHTS:
        # timm fills in labels, license and origin of its own weights of the architecture: not of these. Those
        # of slim weights are never those of the dense ones.
        if name not in identity.pretrained_cfg or (name in PROVENANCE and loaded.record is not None):
            given.pop(name, None)
    given["license"] = license
    arguments = dict(identity.model_args)
    built_for = model_input_size(loaded.model, identity.pretrained_cfg, arguments)
    if given.get("fixed_input_size") and tuple(given.get("input_size", built_for)) != built_for:
        # timm would build it for the images that it now sees.
        arguments.setdefault("img_size", list(built_for[1:]))
    made: Any
    if loaded.record is None:
        with torch.random.fork_rng(devices=[]):
            made = timm.create_model(identity.architecture, **arguments)
        made.pretrained_cfg = {**given, "architecture": identity.architecture}
        made.default_cfg = made.pretrained_cfg
    else:
        plan = loaded.record.plan
        if plan.tokens:
            arguments["tokens"] = plan.tokens.to_json()
        with torch.random.fork_rng(devices=[]):
            made = timm.create_model(
                NAME,
                pretrained_cfg={**given, "architecture": NAME},
                base_architecture=identity.architecture,
                plan=plan.to_json(),
                **arguments,
            )
    made.load_state_dict(loaded.model.state_dict())
    return made


def _save_plain(path: Path, model: nn.Module, dtype: torch.dtype) -> None:
    tensors = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_tensors(tensors, path, {"format": "pt"})
