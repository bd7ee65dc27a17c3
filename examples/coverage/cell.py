"""One architecture cut to half its inner widths by one tool, and read back: a process each.

    python examples/coverage/cell.py cut ARCHITECTURE TOOL FOLDER SECONDS
    python examples/coverage/cell.py reload ARCHITECTURE TOOL FOLDER SECONDS

Prints one JSON object. What a tool does is in its own module, ``tools/``.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import resource
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

MEMORY = 12 * 2**30
"""Address space that a tool may take, in bytes."""
_ATTENTION = re.compile(r"attn|attention|^XCA$|^GPSA$|^MHSA$|LiteMLA", re.IGNORECASE)
_PROJECTION = re.compile(r"^(to_|w)?(qkvs?|qk|kv|q|k|v)(_proj)?(\.\d+)?(\.conv|\.linear|\.c)?\.weight$")


class RefusedError(Exception):
    """The tool says that it cannot, and why, before it changes anything."""


def build(architecture: str) -> nn.Module:
    """The model with random weights, the same in every process; no channel of it is dead."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = timm.create_model(architecture).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model


def image(model: Any) -> Tensor:
    """[1, C, H, W] of the size the model is made for."""
    size = model.pretrained_cfg.get("input_size", (3, 224, 224))
    return torch.randn(1, *size, generator=torch.Generator().manual_seed(2))


def projections(model: nn.Module) -> dict[str, dict[str, int]]:
    """Per attention module its projections to q, k and v, each with the number of its outputs."""
    found: dict[str, dict[str, int]] = {}
    for name, module in model.named_modules():
        if not _ATTENTION.search(type(module).__name__):
            continue
        own = {key: len(tensor) for key, tensor in module.named_parameters() if _PROJECTION.match(key)}
        if own:
            found[name] = own
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def run_cut(architecture: str, tool: Any, folder: Path) -> dict[str, Any]:
    model = build(architecture)
    x, before = image(model), projections(model)
    outputs = model(x).shape
    began = time.process_time()
    try:
        with torch.enable_grad():
            done = tool.cut(model, x)
    except RefusedError as error:
        return {"outcome": "refused", "why": str(error)}
    except MemoryError:
        return {"outcome": "fails", "why": f"more than {MEMORY / 2**30:.0f} GiB of memory"}
    except Exception as error:
        return {"outcome": "fails", "why": short(error)}
    told = {
        "seconds": done.seconds or time.process_time() - began,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "mode": done.mode,
        "silent": done.silent,
        "why": done.told,
    }
    after = {name: len(tensor) for name, tensor in done.model.named_parameters()}
    told["attention"] = len(before)
    told["attention_cut"] = sum(
        all(after.get(f"{name}.{key}", size) < size for key, size in own.items())
        for name, own in before.items()
    )
    try:
        logits = done.model.eval()(x)
    except Exception as error:
        return {**told, "outcome": "breaks", "why": f"its forward fails: {short(error)}"}
    if logits.shape != outputs:
        return {**told, "outcome": "breaks", "why": f"{tuple(logits.shape)} outputs of {tuple(outputs)}"}
    if done.masked is not None:
        told["difference"] = relative(logits, done.masked(build(architecture))(x))
    torch.save(logits, folder / "logits.pt")
    try:
        tool.save(done, folder)
    except Exception as error:
        told["save"] = short(error)
    return {**told, "outcome": "cut"}


@torch.no_grad()
def run_reload(architecture: str, tool: Any, folder: Path) -> dict[str, Any]:
    try:
        model = tool.load(architecture, folder)
        difference = relative(model.eval()(image(model)), torch.load(folder / "logits.pt", weights_only=True))
    except Exception as error:
        return {"reloads": False, "why": short(error)}
    return {"reloads": difference < 1e-6, "why": f"differs by {difference:.0e}"}


def short(error: BaseException) -> str:
    lines = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def main(arguments: Sequence[str]) -> int:
    what, architecture, name, folder, limit_s = arguments
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # Of CPU time, which does not depend on what else the machine does. Ends the process by SIGXCPU.
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(float(limit_s)), math.ceil(float(limit_s)) + 5))
    warnings.simplefilter("ignore")
    tool = importlib.import_module(f"tools.{name}")
    step = {"cut": run_cut, "reload": run_reload}[what]
    print(json.dumps(step(architecture, tool, Path(folder))))
    return 0


if __name__ == "__main__":
    from cell import main  # the module that the tools import from, not a second one

    sys.exit(main(sys.argv[1:]))
