"""Write a folder that timm opens, with a card that says what was cut, and push it to the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any, cast

import timm
import torch
from timm.models import save_for_hf

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.identity import PROVENANCE_CFG_KEYS, WEIGHTS_CFG_KEYS
from mhacut.checkpoint.preprocessing import stated_license
from mhacut.checkpoint.write import save_slim
from mhacut.data import Preprocessing
from mhacut.errors import MhacutError, OutputError, option_name
from mhacut.exporting.card import model_card
from mhacut.exporting.runtimes import DTYPES, Runner
from mhacut.exporting.timm_model import NAME
from mhacut.options.export import ExportOptions
from mhacut.runtime.files import check_outputs, fill_folder
from mhacut.runtime.tensor_files import save_tensors
from mhacut.surgery.find import model_input_size

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
FILES = (WEIGHTS, CONFIG, CARD)


def check_folder(target: Path, *, overwrite: bool, input_path: Path | None) -> None:
    """Raise an :class:`OutputError` if the folder must not be written to."""
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file; {option_name('format', 'timm')} writes a folder")
    real = Path(os.path.realpath(target))  # a link may name a folder that is yet to be made
    check_outputs([real / name for name in FILES], overwrite=True, input_paths=(input_path,))
    # Any file counts, not only those of these names: the folder may be something else's.
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise OutputError(
            f"{target}: exists already; choose another name, or {option_name('overwrite', True)}"
        )


def write_folder(
    target: Path,
    loaded: Checkpoint,
    preprocessing: Preprocessing,
    options: ExportOptions,
    compare: Callable[[Runner], None],
) -> None:
    """Write a folder that timm opens: a new one whole or not at all, an old one file by file."""
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
            tensors = {
                name: tensor.to(dtypes[name] if tensor.is_floating_point() else tensor.dtype).contiguous()
                for name, tensor in model.state_dict().items()
            }
            save_tensors(tensors, folder / WEIGHTS, {"format": "pt"})
        else:
            save_slim(folder / WEIGHTS, model, loaded.record, dtypes)
        card = model_card(source, loaded, preprocessing, options.license)
        (folder / CARD).write_text(card, encoding="utf-8")
        # timm initialises a model before it loads it: the caller's random numbers stay as they are.
        with torch.random.fork_rng(devices=[]):
            opened = timm.create_model(f"local-dir:{folder}", pretrained=True)
        opened = opened.eval().requires_grad_(False)
        compare(lambda images: opened(images))

    fill_folder(target, fill)


def _made_by_timm(loaded: Checkpoint, license: str | None) -> Any:
    """Build the model by timm's factory, which keeps the arguments that timm's writer needs."""
    identity, given = loaded.identity, dict(cast(Any, loaded.model).pretrained_cfg)
    for name in WEIGHTS_CFG_KEYS:
        # timm fills in labels, license and origin of its own weights of the architecture: not of these. Those
        # of slim weights are never those of the dense ones.
        if name not in identity.pretrained_cfg or (name in PROVENANCE_CFG_KEYS and loaded.record is not None):
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


def check_hub(options: ExportOptions) -> None:
    """Raise a :class:`MhacutError` unless the hub answers and accepts the token; nothing is uploaded."""
    from huggingface_hub import whoami

    try:
        whoami()
    except Exception as error:  # the hub and the network fail in types of their own libraries
        raise MhacutError(
            f"{option_name('push_to_hub', options.push_to_hub)}: the Hugging Face hub takes no upload "
            f"({_reason(error)}); run hf auth login, or export without it and upload the folder later"
        ) from error


def push_folder(folder: Path, options: ExportOptions) -> str:
    """Create the repository if there is none, and commit the files of :func:`write_folder` to it."""
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
            f"{option_name('push_to_hub', repository)}: failed ({_reason(error)}); {folder} was written and "
            f"stays: try again with hf upload {repository} {quote(str(folder))}"
        ) from error
    return str(pushed.commit_url)


def _reason(error: BaseException) -> str:
    """Return the first line of an error and of its cause."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    cause = "" if error.__cause__ is None else f": {_reason(error.__cause__)}"
    return f"{first + cause:.200}"
