"""The dense model that a pruned one is compared with."""

from __future__ import annotations

from typing import Any

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.identity import dense_args
from mhacut.checkpoint.load import part_of_dense, read_model, states_its_model
from mhacut.errors import UsageError, option_name
from mhacut.options.base import PathLike
from mhacut.runtime.progress import Reporter
from mhacut.surgery.find import model_input_size


def read_dense(
    source: PathLike, opened: Checkpoint, reporter: Reporter, part: str | None = None
) -> Checkpoint:
    """Read the checkpoint of ``--compare``.

    A file that does not state its architecture is taken to have that of ``opened``.

    Args:
        source: a checkpoint, or ``timm:NAME``.
        opened: the checkpoint that is inspected.
        reporter: receives a message where the history of ``opened`` names another file.
        part: entry of a training checkpoint, or module in it, that is the model; slim files have none.

    Raises:
        UsageError: the two have different architectures or input sizes, or ``source`` is slim and ``opened``
            dense.
        CheckpointError: it cannot be read.
    """
    identity = opened.identity
    stated: dict[str, Any] = {}
    part = part_of_dense(source, part)
    if not states_its_model(source, part):
        stated = {"model": identity.architecture, "model_args": dense_args(identity)}
    dense = read_model(source, part=part, **stated)
    compared = option_name("compare", dense.source)
    if dense.identity.architecture != identity.architecture:
        raise UsageError(
            f"{compared}: expected the checkpoint's architecture, {identity.architecture}, "
            f"found {dense.identity.architecture}; give the dense model that it was made from"
        )
    if opened.record is None and dense.record is not None:
        raise UsageError(
            f"{compared}: is a slim file and {opened.source} is dense; inspect the slim one, and compare it "
            "with the dense one"
        )
    size, expected = (
        model_input_size(one.skeleton, one.identity.pretrained_cfg, one.identity.model_args)
        for one in (dense, opened)
    )
    if size != expected:
        shown, wanted = ("x".join(map(str, each)) for each in (size, expected))
        raise UsageError(
            f"{compared}: takes images of {shown}, the checkpoint of {wanted}; give the "
            "dense model that it was made from"
        )
    # A list: an untrusted history may hold what cannot be in a set.
    if opened.record is not None and dense.sha256 not in [
        entry.get("source_sha256") for entry in opened.record.history
    ]:
        reporter.log(f"{dense.source} is not the file that {opened.source} was cut from")
    return dense
