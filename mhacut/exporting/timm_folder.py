"""Write a folder with model card that timm opens, and push it to the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from runpy import run_path
from shlex import quote
from typing import Any, cast

import timm
import torch
from timm.models import save_for_hf

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.identity import PROVENANCE_CFG_KEYS, WEIGHTS_CFG_KEYS
from mhacut.checkpoint.preprocessing import stated_license
from mhacut.checkpoint.write import save_slim, save_tensors
from mhacut.data import Preprocessing
from mhacut.errors import MhacutError, OutputError, option_name
from mhacut.exporting.card import model_card
from mhacut.exporting.runtimes import DTYPES, Runner
from mhacut.exporting.timm_code import timm_code
from mhacut.exporting.timm_model import NAME
from mhacut.options.export import ExportOptions
from mhacut.runtime.files import check_outputs, exists_already, fill_folder
from mhacut.surgery.find import model_input_size

WEIGHTS, CONFIG, CARD, CODE = "model.safetensors", "config.json", "README.md", "model.py"
FILES = (WEIGHTS, CONFIG, CARD, CODE)


def check_folder(target: Path, *, overwrite: bool, input_path: Path | None) -> None:
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file; {option_name('format', 'timm')} writes a folder")
    real = Path(os.path.realpath(target))  # the target of a link may not exist yet
    check_outputs([real / name for name in FILES], overwrite=True, input_paths=(input_path,))
    # Any file counts: the folder may belong to another program.
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise OutputError(f"{target}: {exists_already(target)}")


def write_folder(
    target: Path,
    loaded: Checkpoint,
    preprocessing: Preprocessing,
    options: ExportOptions,
    compare: Callable[[Runner], None],
    log: Callable[[str], None],
) -> None:
    """Write a folder that timm opens, unless ``compare`` raises an error for the folder's model.

    ``log`` receives the reason if ``model.py`` is left out.
    """
    target = Path(os.path.realpath(target))
    model, arguments = _made_by_timm(loaded, options.license or stated_license(loaded))
    dtypes = dict.fromkeys(model.state_dict(), DTYPES[options.dtype])
    pushed_to = options.push_to_hub
    source = f"local-dir:{target.name}" if pushed_to is None else f"hf-hub:{pushed_to}"

    def fill(folder: Path) -> None:
        has_code = False
        # timm's writer writes the configuration that timm's reader expects, and no weights (None: neither
        # pickle nor safetensors), because it fails on modules with several names.
        save_for_hf(model, str(folder), safe_serialization=cast(Any, None))
        if loaded.record is None:
            tensors = {
                name: tensor.to(dtypes[name] if tensor.is_floating_point() else tensor.dtype).contiguous()
                for name, tensor in model.state_dict().items()
            }
            save_tensors(tensors, folder / WEIGHTS, {"format": "pt"})
        else:
            save_slim(folder / WEIGHTS, model, loaded.record, dtypes)
            has_code = _write_code(folder, loaded, arguments, compare, log)
        card = model_card(source, loaded, preprocessing, options.license, has_code=has_code)
        (folder / CARD).write_text(card, encoding="utf-8")
        # timm initialises the model, which must not change the caller's random numbers.
        with torch.random.fork_rng(devices=[]):
            opened = timm.create_model(f"local-dir:{folder}", pretrained=True)
        opened = opened.eval().requires_grad_(False)
        compare(lambda images: opened(images))
        if not has_code:
            (target / CODE).unlink(missing_ok=True)  # of the model that was in the folder

    fill_folder(target, fill)


def _write_code(
    folder: Path,
    loaded: Checkpoint,
    arguments: Mapping[str, Any],
    compare: Callable[[Runner], None],
    log: Callable[[str], None],
) -> bool:
    code = folder / CODE
    try:
        text = timm_code(loaded.model, loaded.identity.architecture, arguments)
        code.write_text(text, encoding="utf-8")
        with torch.random.fork_rng(devices=[]):
            model = run_path(str(code))["build"]().requires_grad_(False)
        compare(lambda images: model(images))
    except Exception as error:  # the code may fail in any way for layers that it was not written for
        reason, _, _ = _reason(error).partition("; nothing was written")
        log(f"{CODE} is left out, so the folder needs mhacut: {reason}")
        code.unlink(missing_ok=True)
        return False
    return True


def _made_by_timm(loaded: Checkpoint, license: str | None) -> tuple[Any, dict[str, Any]]:
    """Rebuild the model with ``timm.create_model``: timm's writer needs the arguments stored in the model.

    Return the model and the arguments of the dense architecture.
    """
    identity, given = loaded.identity, dict(cast(Any, loaded.model).pretrained_cfg)
    for name in WEIGHTS_CFG_KEYS:
        # timm fills in labels, license and origin of its own pretrained weights, which these are not. The
        # origin of dense weights is not that of slim weights.
        if name not in identity.pretrained_cfg or (name in PROVENANCE_CFG_KEYS and loaded.record is not None):
            given.pop(name, None)
    given["license"] = license
    arguments = dict(identity.model_args)
    built_for = model_input_size(loaded.model, identity.pretrained_cfg, arguments)
    if given.get("fixed_input_size") and tuple(given.get("input_size", built_for)) != built_for:
        # timm would build the model for the size in the configuration.
        arguments.setdefault("img_size", list(built_for[1:]))
    made: Any
    if loaded.record is None:
        with torch.random.fork_rng(devices=[]):
            made = timm.create_model(identity.architecture, **arguments)
        made.pretrained_cfg = {**given, "architecture": identity.architecture}
        made.default_cfg = made.pretrained_cfg
    else:
        plan = loaded.record.plan
        tokens = {"tokens": plan.tokens.to_json()} if plan.tokens else {}
        with torch.random.fork_rng(devices=[]):
            made = timm.create_model(
                NAME,
                pretrained_cfg={**given, "architecture": NAME},
                base_architecture=identity.architecture,
                plan=plan.to_json(),
                **arguments,
                **tokens,
            )
    made.load_state_dict(loaded.model.state_dict())
    return made, arguments


def check_hub(options: ExportOptions) -> None:
    """Raise :class:`MhacutError` if the Hugging Face hub does not accept the user's token."""
    from huggingface_hub import whoami

    try:
        whoami()
    except Exception as error:  # huggingface_hub and its network libraries have many error types
        raise MhacutError(
            f"{option_name('push_to_hub', options.push_to_hub)}: the Hugging Face hub refuses uploads "
            f"({_reason(error)}). Run hf auth login, or export without the option and upload the folder later"
        ) from error


def push_folder(folder: Path, options: ExportOptions) -> str:
    """Upload the files of :func:`write_folder` to the Hugging Face hub. Return the URL of the commit."""
    from huggingface_hub import create_repo, upload_folder

    repository = str(options.push_to_hub)
    try:
        create_repo(repository, private=options.private, exist_ok=True)
        pushed = upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(FILES),
            commit_message="Add model exported by mhacut",
        )
    except Exception as error:  # as above
        raise MhacutError(
            f"{option_name('push_to_hub', repository)}: failed ({_reason(error)}). {folder} was written. "
            f"Try again with hf upload {repository} {quote(str(folder))}"
        ) from error
    return str(pushed.commit_url)


def _reason(error: BaseException) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    cause = "" if error.__cause__ is None else f": {_reason(error.__cause__)}"
    return f"{first + cause:.200}"
