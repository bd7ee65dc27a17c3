"""Files with the plan, class name and tensors of a pruned submodule."""

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
from mhacut.checkpoint.folder import INDEXES, PREPROCESSORS, PRUNED
from mhacut.checkpoint.header import infos
from mhacut.checkpoint.modeling import MODULE, modeling_of
from mhacut.checkpoint.record import PART_KEY
from mhacut.checkpoint.write import save_tensors
from mhacut.errors import CheckpointError, MhacutError, OutputError, UsageError
from mhacut.plan import Plan
from mhacut.runtime.files import check_outputs, fill_folder, parse_json, show, write_file
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.slice import cut
from mhacut.surgery.submodule import shown
from mhacut.surgery.tokens import stack_of
from mhacut.text import listed

REST, CARD = "rest.safetensors", "README.md"
MODELING = f"{MODULE}.py"
FILES = "config.json", PRUNED, REST, CARD, MODELING, INDEXES[0]
_RECORD = "mhacut_pruned"
"""Attribute of a pruned submodule that stores its plan, class name and FLOPs."""


def cut_part(part: nn.Module, name: str, plan: Plan, tensors: Mapping[str, Tensor], **made: Any) -> None:
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
    for pruned in _pruned_in(model):
        inner, outer = sorted((f".{pruned}" if pruned else "", f".{name}" if name else ""), key=len)[::-1]
        if f"{inner}.".startswith(f"{outer}."):
            raise UsageError(f"{shown(pruned)} was pruned already. Start from the dense model")


def _pruned_in(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if _RECORD in vars(module)}


def pruned_part(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """Return the name of the pruned submodule, and its metadata, a dict that callers may change."""
    pruned = _pruned_in(model)
    if len(pruned) != 1:
        names = ", ".join(map(shown, pruned)) or "none. Call prune_ first"
        raise UsageError(f"expected 1 pruned submodule, found {names}")
    ((name, part),) = pruned.items()
    return name, vars(part)[_RECORD]


def save_pruned(model: nn.Module, file: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write the submodule that :func:`mhacut.prune_` pruned.

    Args:
        model: the model or the pruned submodule.
        file: if the name ends in ``.safetensors``, a file with the pruned submodule only. Otherwise a folder
            with the whole transformers model, for :func:`load_pruned`. transformers opens most of these
            folders with ``trust_remote_code=True``.
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
    """Implement :func:`save_pruned`. ``finish`` gets the new folder and may add files to the folder."""
    name, record = pruned_part(model)
    part = model.get_submodule(name)
    version = 2 if "tokens" in record else 1  # version 1 has no token merging
    text = json.dumps({"format_version": version, **record, "part": name or record["part"]})

    def write(path: Path, inside: str = "") -> None:
        tensors = {inside + key: tensor for key, tensor in _tensors(part).items()}
        save_tensors(tensors, path, {"format": "pt", PART_KEY: text})

    def fill(folder: Path) -> None:
        whole: Any = model
        config = copy.deepcopy(whole.config)
        config.architectures = [type(model).__name__]
        inside = f"{name}." if name else ""
        write(folder / PRUNED, inside)
        tensors = _tensors(model)
        rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(inside)}
        if rest:
            save_tensors(rest, folder / REST, {"format": "pt"})
        modeling = modeling_of(model)
        if modeling is None:  # only mhacut opens it
            vars(config).pop("auto_map", None)
        else:
            entries, source = modeling
            vars(config).update(entries)
            (folder / MODELING).write_text(source, "utf-8")
            shards = {key: REST if key in rest else PRUNED for key in tensors}
            size = sum(tensor.nbytes for tensor in tensors.values())
            index = {"metadata": {"total_size": size}, "weight_map": shards}
            (folder / INDEXES[0]).write_text(json.dumps(index, indent=1), "utf-8")
        config.save_pretrained(folder)
        for preprocessor in preprocessors:
            shutil.copyfile(preprocessor, folder / preprocessor.name)
        (folder / CARD).write_text(_card(Path(file).name, name, record, config), "utf-8")
        finish(folder)

    if Path(file).suffix == ".safetensors":
        write_file(file, write, overwrite=overwrite, input_path=None)
        return
    if not hasattr(model, "save_pretrained"):
        raise UsageError(
            f"{show(file)}: expected a name ending in .safetensors. Folders need a transformers model"
        )
    if (other := Path(file) / "model.safetensors").exists():
        raise OutputError(
            f"{show(other)}: transformers would open this file, not the pruned model; choose another folder"
        )
    source = getattr(model, "name_or_path", "")
    preprocessors = [Path(source, one) for one in PREPROCESSORS if source and Path(source, one).is_file()]
    written = [Path(file) / one for one in (*FILES, *(path.name for path in preprocessors))]
    check_outputs(written, overwrite=overwrite, input_paths=())
    fill_folder(file, fill)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().contiguous() for key, tensor in module.state_dict().items()}


def _card(folder: str, name: str, record: Mapping[str, Any], config: Any) -> str:
    pruned = f"{shown(name).capitalize()} ({record['class']}, {record['library']})"
    share = f"{record['flops_after'] / record['flops_before']:.0%}"
    lines = ["import mhacut", "", f'model = mhacut.load_pruned("{folder}")']
    for auto in getattr(config, "auto_map", {}):
        lines = [f"from transformers import {auto}", ""]
        lines.append(f'model = {auto}.from_pretrained("{folder}", trust_remote_code=True)  # without mhacut')
    code = "\n".join(lines)
    return f"""---
library_name: transformers
tags: [mhacut, pruned]
---

# {config.architectures[0]}, pruned

{pruned} was pruned by mhacut {record["mhacut"]} to {share} of its FLOPs.

```python
{code}
```
"""


def _opened(folder: str | os.PathLike[str], make: Callable[[Any, Any], Any]) -> Any:
    where = show(folder)
    try:
        transformers: Any = import_module("transformers")
    except ImportError:
        raise MhacutError(f"{where}: needs transformers: pip install 'mhacut[interop]'") from None
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        cls = getattr(transformers, config.architectures[0])
        assert issubclass(cls, transformers.PreTrainedModel)
        return make(cls, config)
    except Exception as error:  # the library's own types
        raise CheckpointError(f"{where}: transformers cannot open it: {error!s:.200}") from None


def load_dense(folder: str | os.PathLike[str]) -> tuple[nn.Module, torch.dtype]:
    where, args = show(folder), {"local_files_only": True, "output_loading_info": True}
    model, loading_info = _opened(folder, lambda cls, _: cls.from_pretrained(folder, dtype="auto", **args))
    if missing := sorted(loading_info["missing_keys"]):
        raise CheckpointError(f"{where}: tensors are missing: {listed(missing, 3)}. Copy the folder again")
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
        raise CheckpointError(
            f"{where}: expected a folder of save_pruned. Open .safetensors files with apply_pruned"
        )
    tensors, _ = safetensors_header(Path(folder) / PRUNED)
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = _opened(folder, lambda cls, config: cls(config)).eval()
    model.to(next(info.dtype for info in tensors.values() if info.dtype.is_floating_point))
    apply_pruned(model, Path(folder) / PRUNED)
    name, _ = pruned_part(model)
    inside = f"{name}." if name else ""
    rest = {key for key in model.state_dict() if not key.startswith(inside)}
    if rest:
        header, _ = safetensors_header(Path(folder) / REST)
        values = read_safetensors(Path(folder) / REST, header)
        if header != infos({key: tensor for key, tensor in model.state_dict().items() if key in rest}):
            raise CheckpointError(f"{where}: tensors of {REST} do not fit config.json. Copy the folder again")
        model.load_state_dict(values, strict=False)
    return model


@torch.no_grad()
def apply_pruned(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Cut a dense model in place by the plan in ``file``, and load the pruned weights from ``file``.

        model = AutoModel.from_config(config)
        mhacut.apply_pruned(model, "pruned.safetensors")

    Args:
        model: dense model of the same configuration as in :func:`mhacut.prune_`, or the submodule to cut.
        file: ``.safetensors`` file that :func:`save_pruned` wrote.

    Raises:
        CheckpointError: the file is damaged or for another model. ``model`` is unchanged.
        UsageError: the submodule was pruned before.
    """
    where, (tensors, metadata) = show(file), safetensors_header(Path(file))
    record = parse_json(metadata.get(PART_KEY, "{}"), f"{where}: metadata {PART_KEY!r}")
    if record.get("format_version") not in (1, 2):
        raise CheckpointError(
            f"{where}: expected a file of save_pruned, version 1 or 2. Open slim files with load_model"
        )
    cls, recorded = str(record.get("class")), str(record.get("part"))
    candidates = [name for name, module in model.named_modules() if type(module).__name__ == cls]
    if recorded not in candidates and len(candidates) != 1:
        count = f"{len(candidates)}. Give one of these modules" if candidates else "none"
        raise CheckpointError(f"{where}: expected 1 {cls} in the {type(model).__name__}, found {count}")
    name = recorded if recorded in candidates else candidates[0]
    part = model.get_submodule(name)
    check_dense(model, name)
    outline = copy.deepcopy(part).to("meta")
    try:
        # Forms of layers and blocks are proved on values, and the outline has none.
        find_prunable_layers(part)
        stack_of(part)
        plan = Plan.from_json(record.get("plan"), record.get("tokens"))
        cut(outline, plan)
    except MhacutError as error:
        raise CheckpointError(f"{where}: does not fit this {cls}: {error}") from None
    expected, stored = infos(outline.state_dict()), tensors
    # In folders, tensors have their names in the whole model.
    inside = "" if expected.keys() >= stored.keys() else f"{recorded}."
    tensors = {key.removeprefix(inside): info for key, info in stored.items()}
    for key in expected | tensors:
        shape, found = (list(side[key].shape) if key in side else None for side in (expected, tensors))
        if shape != found:
            raise CheckpointError(
                f"{where}: does not fit this {cls}: {key!r:.150}: expected {shape}, found {found}. Build the "
                "model from the same configuration"
            )
    values = read_safetensors(Path(file), stored)
    values = {key.removeprefix(inside): tensor for key, tensor in values.items()}
    made = {key: record[key] for key in ("flops_before", "flops_after", "history") if key in record}
    cut_part(part, name, plan, values, **made)
