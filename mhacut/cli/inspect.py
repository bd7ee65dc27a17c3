"""``mhacut inspect``."""

from __future__ import annotations

from dataclasses import replace

from mhacut.cli.console import Console
from mhacut.cli.flags import FLAGS, Flag, command
from mhacut.options.inspect import InspectOptions

_FLAGS: dict[str, Flag] = {
    "checkpoint": FLAGS["checkpoint"],
    "layer": Flag("What is shown", "Only layers whose name fits, head by head: 'blocks.1*.attn'.", "GLOB"),
    "heads": Flag("What is shown", "Every head, and the channels it keeps or would keep at 75, 50, 25 %."),
    "html": Flag("What is shown", "Write the report as one page that needs no network.", "FILE"),
    "png": Flag("What is shown", "Draw its charts; needs pip install 'mhacut[plot]'.", "FILE"),
    "overwrite": Flag("What is shown", "Replace FILE if it exists."),
    "compare": Flag("What is shown", "Layer by layer beside the dense model it was made from.", "DENSE"),
    "sort": Flag("What is shown", "Order of the layers; all but the first put the largest on top."),
    "shapes": Flag("What is shown", "Widths and costs from the file's header alone; reads no weights."),
    "model": FLAGS["model"],
    "model_args": FLAGS["model_args"],
    "num_classes": FLAGS["num_classes"],
    "data_dir": Flag("Data", "Judge heads by images: folder with train/, or of images.", "DIR"),
    "dataset": FLAGS["dataset"],
    "train_split": Flag("Data", "Split the images are taken from.", "NAME"),
    "calibration_images": Flag("Data", "How many images to look at; by default 64.", "N"),
    "seed": Flag("Data", "Of the choice of images.", "N"),
    **{name: FLAGS[name] for name in ("mean", "std", "crop_pct", "interpolation", "img_size")},
    "batch_size": FLAGS["batch_size"],
    "device": FLAGS["device"],
}


@command(InspectOptions, flags=_FLAGS)
def inspect(options: InspectOptions, console: Console) -> None:
    """Show what is in CHECKPOINT, dense or slim: what each layer costs, how redundant its heads are.

    Widths are channels per head. Heads are judged by the weights alone, or by images with --data-dir.

    Example: mhacut inspect vit.safetensors --layer 'blocks.1*.attn'
    """
    from mhacut.cli.inspect_json import document
    from mhacut.cli.inspect_text import text
    from mhacut.commands.inspect import run_inspect

    heads = options.heads or options.layer is not None
    if console.as_json:  # which has everything
        options = replace(options, heads=True)
    result = run_inspect(options, console)
    console.result(text(result, heads=heads), document(result))
