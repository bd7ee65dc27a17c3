"""Push a folder for timm to the Hugging Face hub, by ``huggingface_hub``'s own calls."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from mhacut.checkpoint.hub import hub_answers
from mhacut.errors import MhacutError, option_name
from mhacut.options.export import ExportOptions


def check_hub(options: ExportOptions) -> None:
    """Raise a :class:`MhacutError` unless the hub answers and accepts the token; nothing is uploaded."""
    from huggingface_hub import constants, get_token, whoami

    push = option_name("push_to_hub", options.push_to_hub)
    if get_token() is None:
        raise MhacutError(
            f"{push}: no token for the Hugging Face hub was found; run hf auth login, or set HF_TOKEN"
        )
    if not hub_answers():
        raise MhacutError(
            f"{push}: the Hugging Face hub ({constants.ENDPOINT}) cannot be reached; export without it, and "
            "upload the folder later with hf upload"
        )
    try:
        whoami()
    except Exception as error:  # the hub and the network fail in types of their own libraries
        raise MhacutError(f"{push}: the hub does not accept the token ({_reason(error)})") from error


def push_folder(folder: Path, files: tuple[str, ...], options: ExportOptions) -> str:
    """Create the repository if there is none, and commit the files of ``folder`` to it.

    Args:
        folder: what :func:`mhacut.exporting.timm_folder.write_folder` wrote.
        files: names of the files to push; other files in the folder are not pushed.
        options: options of the command; ``push_to_hub`` and ``private`` are used.

    Returns:
        The address of the commit.

    Raises:
        MhacutError: the hub refuses, or cannot be reached; the folder stays.
    """
    from huggingface_hub import create_repo, upload_folder

    repository = str(options.push_to_hub)
    try:
        create_repo(repository, private=options.private, exist_ok=True)
        pushed = upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(files),
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
