"""``mhacut inspect``."""

from __future__ import annotations

from dataclasses import replace

from mhacut.cli.console import Console
from mhacut.cli.flags import command
from mhacut.options.inspect import InspectOptions
from mhacut.runtime.files import check_outputs


def _check_outputs(options: InspectOptions) -> None:
    written = (options.html,)
    check_outputs(written, overwrite=options.overwrite, input_paths=options.files_read())


@command(InspectOptions, check_outputs=_check_outputs)
def inspect(options: InspectOptions, console: Console) -> None:
    """Show the layers of CHECKPOINT, dense or slim: what each costs, and how redundant its heads are.

    Widths are channels per head. Heads are assessed from the weights alone, or on images with --data-dir.

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
