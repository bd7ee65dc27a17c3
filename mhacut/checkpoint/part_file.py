"""Files with a pruned submodule: plan, class name and tensors."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mhacut._version import __version__
from mhacut.checkpoint.files import read_safetensors, safetensors_header
from mhacut.checkpoint.folder import PREPROCESSORS, PRUNED
from mhacut.checkpoint.header import infos
from mhacut.checkpoint.record import PART_KEY
from mhacut.checkpoint.untrusted_json import parse_json
from mhacut.errors import CheckpointError, MhacutError, UsageError
from mhacut.plan import Plan
from mhacut.runtime.files import check_outputs, fill_folder, show, write_file
from mhacut.runtime.tensor_files import save_tensors
from mhacut.surgery.slice import cut
from mhacut.surgery.submodule import shown
from mhacut.text import listed

REST, CARD = "rest.safetensors", "README.md"
FILES = "config.json", PRUNED, REST, CARD
"""Files of a folder: configuration, pruned part, other tensors, model card."""
_RECORD = "mhacut_pruned"
"""Attribute of a pruned submodule: the content of its metadata."""


def cut_part(part: nn.Module, name: str, plan: Plan, tensors: Mapping[str, Tensor], **made: Any) -> None:
    """Cut a submodule in place, load ``tensors``, and mark the submodule as pruned."""
    cls = type(part)  # one that merges tokens is of another class
    cut(part, plan)
    part.load_state_dict(tensors)
    library = cls.__module__.partition(".")[0]
    vars(part)[_RECORD] = {
        "part": name,
        "class": cls.__name__,
        "library": f"{library} {getattr(sys.modules.get(library), '__version__', '')}".rstrip(),
        "mhacut": __version__,
        **made,
        "plan": plan.to_json(),
        **({"tokens": plan.tokens.to_json()} if plan.tokens else {}),
    }


def check_dense(model: nn.Module, name: str) -> None:
    """Raise a :class:`UsageError` if the submodule, a parent or a child was pruned before."""
    for pruned in _pruned_in(model):
        inner, outer = sorted((f".{pruned}" if pruned else "", f".{name}" if name else ""), key=len)[::-1]
        if f"{inner}.".startswith(f"{outer}."):
            raise UsageError(f"{shown(pruned)} was pruned already; take the dense model, built anew")


def _pruned_in(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if _RECORD in vars(module)}


def save_pruned(model: nn.Module, file: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write the submodule that :func:`mhacut.prune_` pruned.

    Args:
        model: the model or the pruned submodule.
        file: a name ending in ``.safetensors`` gets the pruned submodule only. Any other name is a folder
            for the whole transformers model, which :func:`load_pruned` opens.
        overwrite: replace existing files.

    Raises:
        UsageError: ``model`` has 0 or several pruned submodules, or ``file`` is a folder and the model has
            no ``save_pretrained``.
        OutputError: a file cannot be written.
    """
    write_pruned(model, file, overwrite=overwrite, finish=lambda folder: None)


def write_pruned(
    model: nn.Module,
    file: str | os.PathLike[str],
    *,
    overwrite: bool,
    finish: Callable[[Path], object],
) -> None:
    """Write as :func:`save_pruned`. ``finish`` gets a folder before its files appear."""
    found = _pruned_in(model)
    if len(found) != 1:
        names = ", ".join(map(shown, found)) or "none: prune_ makes one"
        raise UsageError(f"expected one pruned part, found {names}")
    ((name, part),) = found.items()
    record: Mapping[str, Any] = vars(part)[_RECORD]
    version = 2 if "tokens" in record else 1  # versions of mhacut that know 1 alone merge none
    text = json.dumps({"format_version": version, **record, "part": name or record["part"]})

    def write(path: Path) -> None:
        save_tensors(_tensors(part), path, {"format": "pt", PART_KEY: text})

    def fill(folder: Path) -> None:
        whole: Any = model
        config = copy.deepcopy(whole.config)
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        write(folder / PRUNED)
        inside = f"{name}." if name else ""
        rest = {key: tensor for key, tensor in _tensors(model).items() if not key.startswith(inside)}
        if rest:
            save_tensors(rest, folder / REST, {"format": "pt"})
        for each in beside:
            shutil.copyfile(each, folder / each.name)
        (folder / CARD).write_text(_card(Path(file).name, type(model).__name__, name, record), "utf-8")
        finish(folder)

    if Path(file).suffix == ".safetensors":
        write_file(file, write, overwrite=overwrite, input_path=None)
        return
    if not hasattr(model, "save_pretrained"):
        raise UsageError(
            f"{show(file)}: expected a name that ends in .safetensors; folders are for transformers"
        )
    source = getattr(model, "name_or_path", "")
    beside = [Path(source, each) for each in PREPROCESSORS if source and Path(source, each).is_file()]
    written = [Path(file) / each for each in (*FILES, *(each.name for each in beside))]
    check_outputs(written, overwrite=overwrite, input_paths=())
    fill_folder(file, fill)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().contiguous() for key, tensor in module.state_dict().items()}


def _card(folder: str, cls: str, name: str, record: Mapping[str, Any]) -> str:
    pruned = f"{shown(name).capitalize()} ({record['class']}, {record['library']})"
    share = f"{record['flops_after'] / record['flops_before']:.0%}"
    return f"""---
library_name: transformers
tags: [mhacut, pruned]
---

# {cls}, pruned

{pruned} was pruned by mhacut {record["mhacut"]} to {share} of its FLOPs.

```python
import mhacut

model = mhacut.load_pruned("{folder}")
```
"""


def _opened(folder: str | os.PathLike[str], make: Callable[[Any, Any], Any]) -> Any:
    """Call ``make(class, config)`` for the class and configuration in ``config.json``."""
    where = show(folder)
    try:
        transformers: Any = import_module("transformers")
    except ImportError:
        raise MhacutError(f"{where}: needs the package transformers; pip install 'mhacut[interop]'") from None
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        cls = getattr(transformers, config.architectures[0])
        assert issubclass(cls, transformers.PreTrainedModel)
        return make(cls, config)
    except Exception as error:  # the library's own
        raise CheckpointError(f"{where}: holds no model that transformers open: {error!s:.200}") from None


def load_dense(folder: str | os.PathLike[str]) -> tuple[nn.Module, torch.dtype]:
    """Return a transformers model in eval mode, float32, and the dtype of its file."""
    where, given = show(folder), {"local_files_only": True, "output_loading_info": True}
    if (Path(folder) / PRUNED).is_file():
        raise UsageError(f"{where}: was pruned already; give the folder of the dense model")
    model, about = _opened(folder, lambda cls, _: cls.from_pretrained(folder, dtype="auto", **given))
    if missing := sorted(about["missing_keys"]):
        raise CheckpointError(f"{where}: tensors of {type(model).__name__} are missing: {listed(missing, 3)}")
    dtype: torch.dtype = model.dtype
    return model.float().eval().requires_grad_(False), dtype


def load_pruned(folder: str | os.PathLike[str]) -> nn.Module:
    """Return the transformers model in a folder of :func:`save_pruned`, in eval mode.

    Raises:
        CheckpointError: the folder is damaged or was not written by ``save_pruned``.
        MhacutError: transformers is not installed.
    """
    where = show(folder)
    if not Path(folder).exists():
        raise CheckpointError(f"{where}: not found")
    if not (Path(folder) / PRUNED).is_file():
        raise CheckpointError(f"{where}: no folder of save_pruned; apply_pruned opens its files")
    tensors, _ = safetensors_header(Path(folder) / PRUNED)
    with torch.random.fork_rng(devices=[]):
        model: Any = _opened(folder, lambda cls, config: cls(config)).eval()
    model.to(next(each.dtype for each in tensors.values() if each.dtype.is_floating_point))
    apply_pruned(model, Path(folder) / PRUNED)
    ((name, _),) = _pruned_in(model).items()
    inside = f"{name}." if name else ""
    rest = {key for key in model.state_dict() if not key.startswith(inside)}
    if rest:
        header, _ = safetensors_header(Path(folder) / REST)
        values = read_safetensors(Path(folder) / REST, header)
        if header != infos({key: each for key, each in model.state_dict().items() if key in rest}):
            raise CheckpointError(f"{where}: {REST} is not of the model that config.json states")
        model.load_state_dict(values, strict=False)
    found: nn.Module = model
    return found


@torch.no_grad()
def apply_pruned(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Cut a dense model in place as described in ``file``, and load the pruned weights.

        model = AutoModel.from_config(config)
        mhacut.apply_pruned(model, "pruned.safetensors")

    Args:
        model: dense model of the same configuration as in :func:`mhacut.prune_`, or the submodule to cut.
        file: file of :func:`save_pruned`.

    Raises:
        CheckpointError: the file is damaged or for another model. The model is unchanged.
        UsageError: the submodule was pruned before.
    """
    where, (tensors, metadata) = show(file), safetensors_header(Path(file))
    record = parse_json(metadata.get(PART_KEY, "{}"), f"{where}: metadata {PART_KEY!r}")
    if record.get("format_version") not in (1, 2):
        raise CheckpointError(
            f"{where}: expected a file of save_pruned, version 1 or 2; load_model opens slim files"
        )
    cls, stated = str(record.get("class")), str(record.get("part"))
    alike = [name for name, module in model.named_modules() if type(module).__name__ == cls]
    if stated not in alike and len(alike) != 1:
        found = f"{len(alike)} of these; give one of them" if alike else "none"
        raise CheckpointError(f"{where}: holds a pruned {cls}; the {type(model).__name__} has {found}")
    name = stated if stated in alike else alike[0]
    part = model.get_submodule(name)
    check_dense(model, name)
    outline = copy.deepcopy(part).to("meta")
    try:
        plan = Plan.from_json(record.get("plan"), record.get("tokens"))
        cut(outline, plan)
    except MhacutError as error:
        raise CheckpointError(f"{where}: is not of this {cls}: {error}") from None
    expected = infos(outline.state_dict())
    for key in expected | tensors:
        shapes = [list(each[key].shape) if key in each else None for each in (expected, tensors)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{where}: is not of this {cls}: {key!r:.150} is {shapes[1]} there, expected {shapes[0]}; "
                "build the model of the same configuration"
            )
    values = read_safetensors(Path(file), tensors)
    flops = {key: record.get(key) for key in ("flops_before", "flops_after")}
    cut_part(part, name, plan, values, **flops)
