"""``mhacut finetune``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mhacut.cli.flags import command
from mhacut.cli.measure import preprocessing_lines
from mhacut.cli.running import Console
from mhacut.finetuning.folder import LAST, check_folder_before_reading, completed
from mhacut.options.finetune import FinetuneOptions
from mhacut.text import safe, safe_table

if TYPE_CHECKING:
    from mhacut.finetuning.result import FinetuneResult
    from mhacut.measuring.accuracy import Evaluation


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
    console.result(_text(result), _document(result))


def _text(result: FinetuneResult) -> str:
    lines = [safe_table(result.rows()), ""]
    if result.improved is False:
        lines.append(
            "no epoch improved on the start: the saved file holds the initial weights. "
            f"The weights of the last step are in {safe(result.folder / LAST)}"
        )
    processes = "" if result.processes == 1 else f"{result.processes} x "
    speed = f", {result.images_per_second:.0f} images/s on {processes}{safe(result.device)}"
    lines += [
        f"saved {safe(result.output)}",
        f"loads with: mhacut.load_model({str(result.output)!r})",
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


def _document(result: FinetuneResult) -> dict[str, Any]:
    return {
        "directory": result.folder,
        "output": result.output,
        "architecture": result.architecture,
        "before": _accuracy(result.before),
        "after": _accuracy(result.after),
        "held_out_losses": result.losses,
        "improved": result.improved,
        "flops": result.flops,
        "steps": result.steps,
        "epochs": [asdict(row) for row in result.epochs],
        "data": result.data,
        "preprocessing": result.preprocessing.to_json(),
        **result.provenance.to_json(),
        "unreadable": list(result.unreadable),
        "images_per_second": result.images_per_second,
        "device": result.device,
        "processes": result.processes,
        "seconds": result.seconds,
    }


def _accuracy(evaluation: Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    return {"top1": evaluation.top1, "top5": evaluation.top5, "images": evaluation.images}
