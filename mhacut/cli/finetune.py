"""``mhacut finetune``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhacut.cli.flags import command
from mhacut.cli.measure import preprocessing_lines
from mhacut.cli.running import Console
from mhacut.finetuning.folder import LAST, check_folder_before_reading, completed
from mhacut.options.finetune import FinetuneOptions
from mhacut.text import safe, safe_table

if TYPE_CHECKING:
    from mhacut.finetuning.result import FinetuneResult


_USUAL = ("data_dir", "output", "teacher", "labels", "epochs", "steps", "lr", "batch_size", "resume", "amp")


@command(
    FinetuneOptions,
    usual=(*_USUAL, "device", "overwrite"),
    complete=completed,
    check_outputs=check_folder_before_reading,
)
def finetune(options: FinetuneOptions, console: Console) -> None:
    """Fine-tune SLIM with a teacher, labels, or both.

    The default teacher is the dense model, if its file is next to SLIM. With a teacher, images need no
    labels. The folder of the run gets best.safetensors, last.safetensors, summary.csv, args.yaml and
    state.pt (for --resume). Flags have the names of timm's train.py. Several GPUs: torchrun
    --nproc-per-node N -m mhacut finetune ...

    Example: mhacut finetune vit-50pct.safetensors --data-dir images/ -o run
    """
    from mhacut.commands.finetune import run_finetune

    result = run_finetune(options, console)
    console.result(_text(result), result)


def _text(result: FinetuneResult) -> str:
    lines = [safe_table(result.rows()), ""]
    if result.improved is False:
        last = result.output.with_name(LAST).with_suffix(result.output.suffix)
        lines.append(
            "no epoch improved on the start: the saved file holds the initial weights. "
            f"The weights of the last step are in {safe(last)}"
        )
    processes = "" if result.processes == 1 else f"{result.processes} x "
    speed = f", {result.images_per_second:.0f} images/s on {processes}{safe(result.device)}"
    load = "load_model" if result.output.suffix else "load_pruned"
    lines += [
        f"saved {safe(result.output)}",
        f"loads with: mhacut.{load}({str(result.output)!r})",
        f"trained {result.steps} steps on {safe(result.data)}"
        + (speed if result.images_per_second else "; the run was already complete"),
    ]
    lines += preprocessing_lines(result.preprocessing, result.provenance)
    if result.unreadable:
        lines.append(
            f"{len(result.unreadable)} unreadable images were replaced by other images; the first is "
            f"{safe(result.unreadable[0])}"
        )
    return "\n".join(lines)
