r"""Sets token merges in a rotary ViT-Ti beside those in the ViT-Ti that it was distilled from.

    python examples/benchmarks/rotary.py --root downloads --student rotary.safetensors
    python examples/benchmarks/rotary.py --root downloads --student rotary.safetensors --models student \
        --scopes auto --rule representative

No small rotary ViT with real weights is at hand, so the script makes a stand-in: "rotary ViT-Ti, distilled by
us". The teacher is the ViT-Ti of ``--subject``. The student has its weights in timm's ``Eva``, which rotates
q and k. ``dinov3`` has no position table, ``eva02`` keeps the table. The student learns on crops of the
training images, with the loss of ``mhacut/pruning/tune.py``: answers, and class tokens after each block.
Agreement with the teacher on validation images tells what the stand-in is good for: at 95 % or more for
accuracy, below for ratios of errors only.

Both models are then pruned with equal options, by ``--scope auto`` and by channels only. KL is each model's
divergence from its own dense model on the validation images, in nats.

Rows with the scope "merges alone" have the merges of ``--schedules`` and of the pruned models in the dense
model: no cut channels, no training. The student has a row per rule for positions of merged tokens. ``--rule``
prunes with another rule.

- mean: cos and sin are averaged by size, as in mhacut.
- unit length: these averages, brought back to length 1.
- representative: the position of the token that another token is merged into.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from process import commit, describe_machine
from safetensors.torch import load_file, save_file
from subjects import SUBJECTS
from torch import Tensor

import mhacut
from mhacut.pruning.distill import minimise
from mhacut.pruning.tune import FLOOR, HINTS, WARM_UP, augmented
from mhacut.surgery import merging_blocks
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.tokens import set_merged

Row = dict[str, Any]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov3": (
        "vit_small_patch16_dinov3",
        {"num_reg_tokens": 0, "qkv_bias": True, "init_values": 1.0, "dynamic_img_size": False},
    ),
    "eva02": ("eva02_tiny_patch14_224", {"patch_size": 16, "swiglu_mlp": False, "mlp_ratio": 4.0}),
}
"""Architectures of timm, and arguments that make them as small and plain as the teacher."""
HALF = (0.5, 0.5, 0.5)


def architecture(variant: str, classes: int, side: int) -> tuple[str, dict[str, Any]]:
    name, args = VARIANTS[variant]
    args = args | {"embed_dim": 192, "depth": 12, "num_heads": 3, "global_pool": "token"}
    return name, args | {"img_size": side, "num_classes": classes}


def rotary(vit: Any, variant: str, side: int) -> Any:
    """Return timm's ``Eva`` with the weights of ``vit``.

    Biases of k are lost: without rotation, they change no attention.
    """
    name, args = architecture(variant, vit.num_classes, side)
    student: Any = timm.create_model(name, **args).eval()
    weights = dict(vit.state_dict())
    for number in range(len(vit.blocks)):
        bias = weights.pop(f"blocks.{number}.attn.qkv.bias").chunk(3)
        weights |= {f"blocks.{number}.attn.{part}_bias": bias["qkv".index(part)] for part in "qv"}
    if student.pos_embed is None:
        table = weights.pop("pos_embed")
        weights["cls_token"] = weights["cls_token"] + table[:, :1]
        # The mean of the table is no position.
        weights["patch_embed.proj.bias"] = weights["patch_embed.proj.bias"] + table[:, 1:].mean((0, 1))
    # Layer scales stay 1.
    student.load_state_dict(student.state_dict() | weights)
    return student


def run(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits [B, classes] and the class token after each block [blocks, B, C]."""
    tokens: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _block, _args, output: tokens.append(output[:, 0]))
        for block in model.blocks
    ]
    logits = model(images)
    for hook in hooks:
        hook.remove()
    return logits, torch.stack(tokens)


def distil(student: Any, teacher: Any, images: Tensor, options: Any) -> None:
    """Train ``student`` to give the answers and class tokens of ``teacher``."""
    generator = torch.Generator().manual_seed(options.seed)
    with torch.no_grad():
        known = torch.cat([run(teacher, batch)[1] for batch in normal(images[:512]).split(32)], 1)
    variance = known.var(1, correction=0, keepdim=True)
    variance = torch.maximum(variance, FLOOR * variance.mean(-1, keepdim=True))
    order = torch.cat(
        [
            torch.randperm(len(images), generator=generator)
            for _ in range(math.ceil(options.steps * options.batch / len(images)))
        ]
    )
    batches = iter(order.split(options.batch))

    def loss() -> Tensor:
        batch = augmented(normal(images[next(batches)]), generator)
        with torch.no_grad():
            answers, aims = run(teacher, batch)
        found, tokens = run(student, batch)
        return divergence(found, answers) + HINTS * ((tokens - aims).square() / variance).mean()

    minimise(
        loss,
        student.requires_grad_(True).parameters(),
        steps=options.steps,
        lr=options.rate,
        warm_up=math.ceil(WARM_UP * options.steps),
        reporter=Said(100),
    )
    student.requires_grad_(False)


def normal(images: Tensor) -> Tensor:
    return images.float().div(127.5).sub(1)


def divergence(found: Tensor, wanted: Tensor) -> Tensor:
    return F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True)


@torch.no_grad()
def logits_of(model: Any, images: Tensor) -> Tensor:
    return torch.cat([model(normal(batch)) for batch in images.split(50)]).double()


class Said:
    """Tells on stderr what is decided, and every so many steps."""

    def __init__(self, every: int = 0) -> None:
        self.every, self.began = every, time.perf_counter()

    def log(self, message: str) -> None:
        print(f"{time.perf_counter() - self.began:6.0f} s  {message}", file=sys.stderr, flush=True)

    def start(self, stage: str) -> None:
        self.log(stage)

    def advance(self, done: int, total: int, detail: str = "") -> None:
        if self.every and (done % self.every == 0 or done < 4):
            self.log(f"{done} of {total}: {detail}")


def representative(positions: Tensor, averaged: Tensor, matched: Any, prefix: int) -> Tensor:
    batch = len(averaged)
    positions = positions.expand(batch, -1, -1)
    stays = positions[:, prefix + 1 :: 2].gather(
        1, matched.kept[..., None].expand(-1, -1, positions.shape[-1])
    )
    return torch.cat((positions[:, :prefix], stays, positions[:, prefix::2]), 1)


def unit_length(positions: Tensor, averaged: Tensor, matched: Any, prefix: int) -> Tensor:
    sin, cos = averaged.chunk(2, -1)
    length = (sin.square() + cos.square()).sqrt().clamp_min(1e-12)
    return torch.cat((sin / length, cos / length), -1)


RULES: dict[str, Callable[..., Tensor] | None] = {
    "mean": None,
    "unit length": unit_length,
    "representative": representative,
}


@contextmanager
def positions_by(rule: str) -> Iterator[None]:
    """Give merged tokens their positions by ``rule`` while the context is open."""
    chosen, usual = RULES.get(rule), merging_blocks.merge

    def merge(tokens: Any, matched: Any, prefix: int) -> Any:
        merged = usual(tokens, matched, prefix)
        if tokens.positions is None or chosen is None:
            return merged
        return merged._replace(positions=chosen(tokens.positions, merged.positions, matched, prefix))

    if chosen is not None:
        merging_blocks.merge = merge  # type: ignore[assignment]
    try:
        yield
    finally:
        merging_blocks.merge = usual


def pictures(folder: Path, side: int, count: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Return images of a folder in random order [n, 3, side, side], in bytes, and labels [n]."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import pil_to_tensor, resize

    dataset = ImageFolder(str(folder))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()[:count]
    found, labels = [], []
    for index in order:
        image, label = dataset[index]
        found.append(pil_to_tensor(resize(image, [side, side], InterpolationMode.BICUBIC)))
        labels.append(label)
    return torch.stack(found), torch.tensor(labels)


HEADINGS: dict[str, str] = {
    "model": "model",
    "scope": "scope",
    "rule": "positions",
    "flops": "FLOPs, %",
    "merged": "merged tokens",
    "kl": "KL",
    "agree": "same as dense, %",
    "top1": "top-1, %",
    "side": "side",
    "seed": "seed",
    "cpu_s": "CPU s",
}


def table(rows: list[Row]) -> str:
    def cell(row: Row, name: str) -> str:
        value = row.get(name, "-")
        digits = {"kl": 4, "flops": 1, "agree": 1, "top1": 1, "cpu_s": 0}.get(name)
        return str(value) if digits is None or value == "-" else f"{value:.{digits}f}"

    lines = ["| " + " | ".join(HEADINGS.values()) + " |", "|" + "---|" * len(HEADINGS)]
    return "\n".join(lines + ["| " + " | ".join(cell(row, name) for name in HEADINGS) + " |" for row in rows])


def page(rows: list[Row]) -> str:
    """Return a file that shows all rows."""
    commits, machines = (
        ", ".join(dict.fromkeys(str(row[name]) for row in rows)) for name in ("commit", "cpu")
    )
    return f"""# Token merges in a rotary ViT-Ti, distilled by us

[`rotary.py`](rotary.py) writes this file; its first lines say what is measured.
KL and "same as dense" compare a pruned model with its own dense model.
In the row "teacher's answers" they compare the student with its teacher.

{table(rows)}

Measured on {machines}; commits {commits}.
"""


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default=".", metavar="DIR", help="folder with the teacher and its images")
    parser.add_argument("--subject", default="tiny200", choices=["tiny200", "narrow10", "wide430"])
    parser.add_argument("--variant", default="dinov3", choices=VARIANTS)
    parser.add_argument("--side", type=int, default=112, help="of images, for teacher and student")
    parser.add_argument("--student", metavar="FILE", help="weights of the student; made if missing")
    parser.add_argument("--steps", type=int, default=1000, help="of distillation")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate of distillation")
    parser.add_argument("--models", nargs="*", default=["student", "teacher"], choices=["student", "teacher"])
    parser.add_argument("--scopes", nargs="*", default=["auto", "attention+mlp"])
    parser.add_argument("--keep", nargs="*", type=float, default=[60.0, 50.0], help="of the FLOPs, in %%")
    parser.add_argument("--schedules", nargs="*", default=[], help="merges of each block, such as 0,6,6,0")
    parser.add_argument("--rule", default="mean", choices=RULES, help="for positions of merged tokens")
    parser.add_argument("--compared", type=int, default=1000, metavar="N", help="validation images")
    parser.add_argument("--effort", default="balanced", choices=["fast", "balanced", "best"])
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--merge", metavar="FILE", help="JSON file that collects the rows")
    parser.add_argument("--markdown", metavar="FILE", help="file that gets the table of all rows")
    return parser.parse_args()


def scores(found: Tensor, dense: Tensor, labels: Tensor) -> Row:
    return {
        "kl": float(divergence(found, dense)),
        "agree": 100 * float((found.argmax(1) == dense.argmax(1)).double().mean()),
        "top1": 100 * float((found.argmax(1) == labels).double().mean()),
    }


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    subject, root, said = SUBJECTS[options.subject], Path(options.root), Said()
    data = root / subject.data_dir
    teacher: Any = mhacut.load_model(root / subject.checkpoint, model=subject.model)
    teacher.eval().requires_grad_(False).set_input_size(options.side)
    name, args = architecture(options.variant, teacher.num_classes, options.side)
    judged, labels = pictures(data / "val", options.side, options.compared, 0)
    rows: list[Row] = []
    if options.merge and Path(options.merge).exists():
        rows = json.loads(Path(options.merge).read_text("utf-8"))

    def keep(row: Row) -> None:
        about = {"seed": options.seed, "variant": options.variant, "side": options.side}
        rows.append({**row, **about, "commit": commit(), **describe_machine(options.threads)})
        print(table(rows[-1:]), flush=True)
        if options.merge:
            Path(options.merge).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    known = logits_of(teacher, judged)
    file = Path(options.student) if options.student else None
    if file is not None and file.exists():
        student: Any = timm.create_model(name, **args).eval()
        student.load_state_dict(load_file(file))
    else:
        student = rotary(teacher, options.variant, options.side)
        start = time.process_time()
        before = scores(logits_of(student, judged), known, labels)
        said.log(f"before distillation: {before}")
        images, _ = pictures(data / "train", options.side, None, options.seed)
        said.log(f"{len(images)} training images")
        distil(student, teacher, images, options)
        if file is not None:
            save_file(student.state_dict(), file)
        cpu_s = time.process_time() - start
        found = scores(logits_of(student, judged), known, labels)
        keep({"model": f"{options.variant} student, teacher's answers", "cpu_s": cpu_s, **found})
    student.requires_grad_(False)
    for of in options.models:
        dense = student if of == "student" else teacher
        shape = (name, args) if of == "student" else (subject.model, {"img_size": options.side})
        called = f"{options.variant} student" if of == "student" else "teacher"
        wanted = logits_of(dense, judged)
        schedules = dict.fromkeys(
            tuple(int(count) for count in text.split(",")) for text in options.schedules
        )
        for scope in options.scopes:
            with positions_by(options.rule):
                slims = pruned(dense, shape, scope, options, data)
                for slim, row in slims:
                    found = scores(logits_of(slim, judged), wanted, labels)
                    rule = options.rule if of == "student" and sum(row["schedule"]) else "-"
                    keep({"model": called, "rule": rule, **row, **found})
            schedules |= dict.fromkeys(tuple(row["schedule"]) for _, row in slims)
        for schedule in filter(sum, schedules):
            merging = copy.deepcopy(dense)
            set_merged(merging, schedule)
            share = measure_flops(merging, judged.shape[1:]) / measure_flops(dense, judged.shape[1:])
            row = {"model": called, "scope": "merges alone", "flops": 100 * share, "merged": sum(schedule)}
            for rule in RULES if of == "student" else ["-"]:
                with positions_by(rule):
                    found = scores(logits_of(merging, judged), wanted, labels)
                keep({**row, "schedule": list(schedule), "rule": rule, **found})
    if options.markdown:
        Path(options.markdown).write_text(page(rows), encoding="utf-8")


def pruned(
    dense: Any, shape: tuple[str, dict[str, Any]], scope: str, options: argparse.Namespace, data: Path
) -> list[tuple[Any, Row]]:
    """Return the model pruned to each budget, as the command does it, with the row that describes it."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        # A file, because modules do not show all their arguments.
        save_file(dense.state_dict(), Path(folder, "dense.safetensors"))
        results = mhacut.prune_many(
            Path(folder, "dense.safetensors"),
            model=shape[0],
            model_args=shape[1],
            flops=[f"{share:g}%" for share in options.keep],
            data_dir=str(data),
            mean=HALF,
            std=HALF,
            crop_pct=1.0,
            labels=False,
            scope=scope,
            effort=options.effort,
            seed=options.seed,
            eval_images=0,
            latency=False,
            output=Path(folder, "slim-{}.safetensors"),
            reporter=Said(),
        )
        cpu_s = (time.process_time() - start) / len(results)
        slims = []
        for result in results:
            share = 100 * result.flops_after / result.flops_before
            schedule = list(result.plan.tokens.merged)
            row = {"scope": scope, "flops": share, "merged": sum(schedule), "schedule": schedule}
            slims.append((result.model(), {**row, "effort": options.effort, "cpu_s": cpu_s}))
    return slims


if __name__ == "__main__":
    main()
