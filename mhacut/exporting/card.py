"""Model card of a folder for timm and the Hugging Face hub."""

from __future__ import annotations

import re
from contextlib import suppress

import timm

from mhacut.budget import format_flops
from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.preprocessing import provenance, stated_license
from mhacut.checkpoint.record import SlimRecord
from mhacut.data import Preprocessing
from mhacut.limits import is_int, is_number
from mhacut.options.base import PreprocessingOptions
from mhacut.plan import Plan, TokenPlan
from mhacut.runtime.files import REMOTE
from mhacut.surgery.flops import count_parameters, measure_flops

_MAX_FLOPS = 10**18
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(
    source: str, loaded: Checkpoint, preprocessing: Preprocessing, license: str | None, *, has_code: bool
) -> str:
    record, architecture = loaded.record, loaded.identity.architecture
    classes = int(getattr(loaded.model, "num_classes", 0) or 0)
    title = "Architecture" if record is None else "Dense architecture"
    flops = format_flops(measure_flops(loaded.model, preprocessing.input_size))
    before = record.history[0].get("flops_before") if record is not None and record.history else None
    if is_int(before) and 0 < before < _MAX_FLOPS:
        flops += f" (dense: {format_flops(before)})"
    details = {
        title: architecture,
        "Classes": classes,
        "Image size": "x".join(map(str, preprocessing.input_size[1:])),
        "Preprocessing": provenance(loaded, PreprocessingOptions()).describe(preprocessing),
        "FLOPs (multiply-accumulates, with attention)": flops,
        "Parameters": format_flops(count_parameters(loaded.model)),
        **_accuracy(record),
    }
    text = f"{architecture}, not pruned."
    if record is not None:
        text = f"{architecture}, {_cut(record.plan)}." + _tokens(record.plan.tokens)
    lines = [
        *_header(classes > 0, record, license or stated_license(loaded)),
        f"# Model card for {source.partition(':')[2]}",
        "",
        text,
        "",
        "## Model Details",
        *(f"- **{key}:** {value}" for key, value in details.items()),
        "",
        "## Model Usage",
        *_usage(source, cut=record is not None, has_code=has_code),
    ]
    return "\n".join(lines) + "\n" + ("" if record is None else _widths(record))


def _cut(plan: Plan) -> str:
    """Describe in words whether attention, MLPs or both lost channels."""
    kinds = {unit.kind for unit in plan if not unit.keeps_all}
    parts = ["attention"] * bool(kinds - {"hidden"}) + ["MLPs"] * ("hidden" in kinds)
    if not parts:
        return "pruned by mhacut"
    lost = " and ".join(parts)
    return f"pruned by mhacut. Channels of its {lost} are removed: the weight matrices are smaller"


def _tokens(tokens: TokenPlan) -> str:
    text = ""
    if tokens.merged:
        counts = ", ".join(map(str, tokens.merged))
        text += f" Token merging averages {sum(tokens.merged)} similar tokens, by block: {counts}."
    if tokens.output_tokens is not None:
        count = "1 token" if tokens.output_tokens == 1 else f"{tokens.output_tokens} tokens"
        text += f" The last block computes only the {count} that the head reads, so the model has no patch "
        text += "features."
    return text


def _header(classifies: bool, record: SlimRecord | None, license: str | None) -> list[str]:
    task = "image-classification" if classifies else "image-feature-extraction"
    # timm needs mhacut to open a pruned model.
    library = "timm" if record is None else "mhacut"
    lines = ["---", "tags:", *(f"- {tag}" for tag in dict.fromkeys((task, "timm", library)))]
    stated = {
        "pipeline_tag": task,
        "library_name": library,
        "base_model": _base_model(record),
        "license": license,
    }
    return [*lines, *(f"{key}: {value}" for key, value in stated.items() if value is not None), "---"]


def _base_model(record: SlimRecord | None) -> str | None:
    """Return the hub name of the dense model; None if the untrusted history names no model on the hub."""
    source = record.history[0].get("source") if record is not None and record.history else None
    kind, _, name = str(source).partition(":")
    if kind == "timm":
        with suppress(RuntimeError):  # timm no longer has weights of this name
            cfg = timm.get_pretrained_cfg(name)
            name = "" if cfg is None else cfg.hf_hub_id or ""
    name = name.partition("@")[0]  # a revision
    return name if f"{kind}:" in REMOTE and _HUB_NAME.fullmatch(name) else None


def _accuracy(record: SlimRecord | None) -> dict[str, str]:
    history = () if record is None else record.history
    stated = [entry["accuracy"] for entry in history if isinstance(entry.get("accuracy"), dict)]
    # Every step must have measured it: a later step changes the model.
    if not stated or len(stated) < len(history):
        return {}
    figures = {"dense": (stated[0], "top1_before"), "this model": (stated[-1], "top1_after")}
    known = [
        f"{model} {entry[key]:.2f} % of {entry['images']} images"
        for model, (entry, key) in figures.items()
        if is_number(entry.get(key)) and 0 <= entry[key] <= 100 and is_int(entry.get("images"))
    ]
    return {"Top-1 accuracy": ", ".join(known)} if known else {}


def _usage(source: str, *, cut: bool, has_code: bool) -> list[str]:
    without = ["", "`build()` in `model.py` returns the model without mhacut."]
    return [
        "```python",
        "import timm",
        *(["import mhacut  # registers slim models with timm"] if cut else []),
        f'model = timm.create_model("{source}", pretrained=True).eval()',
        "data = timm.data.resolve_model_data_config(model)",
        "transform = timm.data.create_transform(**data, is_training=False)",
        "```",
        *(without if has_code else []),
    ]


def _widths(record: SlimRecord) -> str:
    cut = [unit for unit in record.plan if not unit.keeps_all]
    if not cut:
        return ""
    lines = [
        "",
        "## Widths of the pruned layers",
        "",
        "| layer | kind | heads | width | dense width | basis |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for unit in cut:
        heads = "" if unit.kind == "hidden" else str(unit.heads)
        lines.append(
            f"| `{unit.layer}` | {unit.kind} | {heads} | {unit.width} | {unit.dense_width} | {unit.basis} |"
        )
    return "\n".join(lines) + "\n"
