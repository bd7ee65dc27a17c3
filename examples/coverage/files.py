"""How checkpoints as they lie about are opened: with no flag, with which, or refused with which sentence.

    python examples/coverage/files.py [PATTERN] [--markdown FILE]

Writes each file with random weights, opens it as `mhacut inspect FILE` does, and compares every tensor of the
model with that of the model which was saved (another library's: the logits). Files of transformers and of
open_clip need those (`pip install -e '.[interop]'`); without them, their rows say so.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mhacut.checkpoint.load import read_model
from mhacut.cli.flags import flag_writer
from mhacut.errors import MhacutError, options_written_by
from mhacut.options.measure import InspectOptions

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class File:
    """A model in a layout."""

    name: str
    build: Callable[[], nn.Module]
    write: Callable[[Path, nn.Module], Path]
    """Saves the model in an empty folder; returns what the user has."""
    flags: Mapping[str, Any] = field(default_factory=dict)
    """What is tried if no flag does not do: arguments of :func:`mhacut.load_model`."""
    foreign: bool = False
    """Whether another library built the model."""
    answer: Callable[[Any], Tensor] = lambda output: output
    """What of the other library's output is the model's."""


def of_timm(name: str, **args: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **args).eval()


def under(prefix: str, state: State) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def plain(name: str, prefix: str = "", dtype: torch.dtype = torch.float32) -> Callable[..., Path]:
    """A state dict alone, safetensors or torch by the ending of ``name``."""

    def write(folder: Path, model: nn.Module) -> Path:
        state = {
            key: (tensor.to(dtype) if tensor.is_floating_point() else tensor).clone()
            for key, tensor in under(prefix, model.state_dict()).items()
        }
        save = save_file if name.endswith(".safetensors") else torch.save
        save(state, str(folder / name))
        return folder / name

    return write


def checkpoint(name: str, content: Callable[[State], Mapping[str, Any]]) -> Callable[..., Path]:
    """What a training script saves."""

    def write(folder: Path, model: nn.Module) -> Path:
        torch.save(dict(content(model.state_dict())), folder / name)
        return folder / name

    return write


def lightning(state: State, **hyper: Any) -> dict[str, Any]:
    inside = {**under("model.", state), "criterion.weight": torch.ones(10)}
    return {
        "state_dict": inside,
        "pytorch-lightning_version": "2.5.0",
        "epoch": 3,
        "hyper_parameters": {"lr": 1e-3, **hyper},
    }


def timm_script(architecture: str, **stated: Any) -> Callable[[State], dict[str, Any]]:
    args = {"model": architecture, "num_classes": 10, "img_size": None, "in_chans": None, "lr": 1e-3}
    args |= {"mean": None, "std": None, "model_kwargs": {}, "crop_pct": None, "interpolation": "", **stated}
    return lambda state: {
        "arch": architecture,
        "args": argparse.Namespace(**args),
        "state_dict": state,
        "state_dict_ema": state,
        "epoch": 3,
        "metric": 0.9,
    }


def deit_script(state: State) -> dict[str, Any]:
    args = argparse.Namespace(model="deit_tiny_patch16_224", nb_classes=10, input_size=224, drop=0.0)
    return {"model": state, "args": args, "epoch": 299, "scaler": {}, "model_ema": state}


def dino(state: State) -> dict[str, Any]:
    head = {"mlp.0.weight": torch.ones(3, 2), "last_layer.weight_g": torch.ones(3, 1)}
    return {
        "student": {**under("module.backbone.", state), **under("module.head.", head)},
        "teacher": {**under("backbone.", state), **under("head.", head)},
        "args": argparse.Namespace(arch="vit_small", patch_size=16),
    }


def timm_folder(folder: Path, model: Any) -> Path:
    config = {"architecture": model.default_cfg["architecture"], "num_classes": model.num_classes}
    config |= {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), str(folder / "model.safetensors"))
    return folder


def sharded(folder: Path, model: Any) -> Path:
    timm_folder(folder, model)
    (folder / "model.safetensors").unlink()
    state = model.state_dict()
    for number, part in enumerate((list(state)[:40], list(state)[40:]), 1):
        save_file({key: state[key] for key in part}, str(folder / f"model-{number:05d}-of-00002.safetensors"))
    index = {"weight_map": {}, "metadata": {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


SMALL = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "image_size": 64,
    "patch_size": 8,
}


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Return the model with weights as large as trained ones: the first ones hardly tell norms apart."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.dim() > 1:
            tensor.copy_(torch.randn(tensor.shape) / tensor[0].numel() ** 0.5)
    return model.eval()


def of_transformers(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return randomised(getattr(transformers, model)(getattr(transformers, config)(**options)))

    return build


def of_torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return randomised(getattr(torchvision.models, name)(num_classes=10, **options))

    return build


def of_open_clip() -> nn.Module:
    import open_clip

    built: nn.Module = open_clip.create_model("ViT-B-32").eval()
    return built


def saved_pretrained(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    return folder


def open_clip_folder(folder: Path, model: Any) -> Path:
    import open_clip

    config = {"model_cfg": open_clip.get_model_config("ViT-B-32"), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(
        {key: tensor.clone() for key, tensor in model.state_dict().items()},
        str(folder / "open_clip_model.safetensors"),
    )
    return folder


def hugging_face(name: str, model: str, config: str, answer: Callable[[Any], Tensor], **options: Any) -> File:
    build = of_transformers(model, config, **options)
    return File(f"transformers folder, {name}", build, saved_pretrained, foreign=True, answer=answer)


def logits(output: Any) -> Tensor:
    found: Tensor = output.logits
    return found


def class_token(output: Any) -> Tensor:
    found: Tensor = output.last_hidden_state[:, 0]
    return found


def pooled(output: Any) -> Tensor:
    found: Tensor = output.pooler_output
    return found


TEN = {"num_classes": 10}
VIT, SWIN = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"
FILES = (
    File(
        "safetensors, vit_base_patch16_clip_224",
        of_timm("vit_base_patch16_clip_224", **TEN),
        plain("model.safetensors"),
        {"model": "vit_base_patch16_clip_224"},
    ),
    *(
        File(f"safetensors, {name}", of_timm(name, **args), plain("model.safetensors"))
        for name, args in (
            (VIT, {}),
            ("deit3_small_patch16_224", TEN),
            (SWIN, TEN),
            ("eva02_tiny_patch14_224", TEN),
            ("vit_small_patch14_dinov2", {}),
            ("vit_small_patch14_reg4_dinov2", {"img_size": 224}),
            ("beit_base_patch16_224", TEN),
            ("pvt_v2_b0", TEN),
            ("mobilevit_xxs", TEN),
            ("flatten_pvt_v2_b0", TEN),
            ("vit_tiny_r_s16_p8_224", TEN),
            ("vit_base_patch16_siglip_224", {}),
        )
    ),
    *(
        File(f"safetensors, {VIT}, {told}", of_timm(VIT, **args), plain("model.safetensors"))
        for told, args in (
            ("1 channel, 10 classes", {**TEN, "in_chans": 1}),
            ("32 pixels, patches of 4, 6 blocks", {**TEN, "img_size": 32, "patch_size": 4, "depth": 6}),
            ("384 pixels", {"img_size": 384}),
            ("no classifier", {"num_classes": 0}),
            ("average pooling", {**TEN, "global_pool": "avg"}),
            ("4 registers", {**TEN, "reg_tokens": 4}),
        )
    ),
    File(
        f"safetensors, {SWIN}, 256 pixels, windows of 8",
        of_timm(SWIN, **TEN, img_size=256, window_size=8),
        plain("model.safetensors"),
        {"model_args": {"img_size": 256, "window_size": 8}, "model": SWIN},
    ),
    File(f"safetensors, {SWIN}, no classifier", of_timm(SWIN, num_classes=0), plain("model.safetensors")),
    File(
        "torch, eva02_tiny_patch14_224, no classifier",
        of_timm("eva02_tiny_patch14_224", num_classes=0),
        plain("model.pth"),
    ),
    File(f"torch, {VIT}", of_timm(VIT, **TEN), plain("model.pth")),
    File(f"torch, {VIT}, float16", of_timm(VIT, **TEN), plain("model.pt", dtype=torch.float16)),
    File(f"torch, {VIT}, module.", of_timm(VIT, **TEN), plain("model.pth", "module.")),
    File(f"torch, {VIT}, _orig_mod.module.", of_timm(VIT, **TEN), plain("model.pth", "_orig_mod.module.")),
    File(
        f"safetensors, {VIT}, backbone., no classifier",
        of_timm(VIT, num_classes=0),
        plain("model.safetensors", "backbone."),
    ),
    File(
        "safetensors, xcit_nano_12_p16_384",
        of_timm("xcit_nano_12_p16_384", **TEN),
        plain("model.safetensors"),
    ),
    File(f"safetensors, {SWIN}, model.", of_timm(SWIN, **TEN), plain("model.safetensors", "model.")),
    File(f"Lightning, {VIT}", of_timm(VIT, **TEN), checkpoint("last.ckpt", lightning)),
    File(
        f"Lightning, {SWIN}, model named",
        of_timm(SWIN, **TEN),
        checkpoint("last.ckpt", lambda state: lightning(state, model_name=SWIN)),
    ),
    File("Lightning, pvt_v2_b0", of_timm("pvt_v2_b0", **TEN), checkpoint("last.ckpt", lightning)),
    File(f"timm train.py, {VIT}", of_timm(VIT, **TEN), checkpoint("model_best.pth.tar", timm_script(VIT))),
    File(
        f"timm train.py, {VIT}, 160 pixels",
        of_timm(VIT, **TEN, img_size=160),
        checkpoint("model_best.pth.tar", timm_script(VIT, img_size=160)),
    ),
    File(f"timm train.py, {SWIN}", of_timm(SWIN, **TEN), checkpoint("last.pth.tar", timm_script(SWIN))),
    File(
        "DeiT main.py, deit_tiny_patch16_224",
        of_timm("deit_tiny_patch16_224", **TEN),
        checkpoint("checkpoint.pth", deit_script),
    ),
    File(
        f"EMA beside model, {VIT}",
        of_timm(VIT, **TEN),
        checkpoint("last.pt", lambda state: {"model": state, "ema": {"shadow": state}}),
    ),
    File(
        "DINO, vit_small_patch16_224",
        of_timm("vit_small_patch16_224", num_classes=0),
        checkpoint("checkpoint0080.pth", dino),
        {"part": "teacher"},
    ),
    File(
        f"tutorial's dict, {VIT}",
        of_timm(VIT, **TEN),
        checkpoint(
            "c.pt", lambda state: {"model_state_dict": state, "optimizer_state_dict": {}, "loss": 0.1}
        ),
    ),
    File(f"timm folder, {VIT}", of_timm(VIT, **TEN), timm_folder),
    File(f"timm folder, two shards, {SWIN}", of_timm(SWIN, **TEN), sharded),
    File(
        f"pickled module, {VIT}",
        of_timm(VIT, **TEN),
        lambda folder, model: (torch.save(model, folder / "m.pth"), folder / "m.pth")[1],
    ),
    File(
        "safetensors, ViT of width 200, 5 heads",
        of_timm(VIT, **TEN, embed_dim=200, num_heads=5),
        plain("model.safetensors"),
        {"model": VIT, "model_args": {"num_heads": 5}},
    ),
    File("safetensors, resnet18 (no attention)", of_timm("resnet18", **TEN), plain("model.safetensors")),
    hugging_face("ViT", "ViTForImageClassification", "ViTConfig", logits, **SMALL, num_labels=7),
    hugging_face("DeiT", "DeiTForImageClassification", "DeiTConfig", logits, **SMALL, num_labels=7),
    hugging_face(
        "BEiT",
        "BeitForImageClassification",
        "BeitConfig",
        logits,
        **SMALL,
        num_labels=7,
        use_relative_position_bias=True,
    ),
    hugging_face(
        "DINOv2",
        "Dinov2Model",
        "Dinov2Config",
        class_token,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=64,
        patch_size=8,
    ),
    hugging_face("CLIP vision", "CLIPVisionModel", "CLIPVisionConfig", pooled, **SMALL),
    hugging_face("SigLIP vision", "SiglipVisionModel", "SiglipVisionConfig", pooled, **SMALL),
    hugging_face(
        "Swin",
        "SwinForImageClassification",
        "SwinConfig",
        logits,
        image_size=64,
        patch_size=4,
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=7,
    ),
    hugging_face(
        "PVTv2",
        "PvtV2ForImageClassification",
        "PvtV2Config",
        logits,
        image_size=64,
        depths=[1, 2, 1, 1],
        hidden_sizes=[8, 16, 24, 32],
        num_attention_heads=[1, 2, 3, 4],
        num_labels=7,
    ),
    File("torchvision, vit_b_16", of_torchvision("vit_b_16"), plain("vit.pth"), foreign=True),
    File("torchvision, swin_t", of_torchvision("swin_t"), plain("swin.pth"), foreign=True),
    File(
        "open_clip folder, ViT-B-32",
        of_open_clip,
        open_clip_folder,
        foreign=True,
        answer=lambda output: output,
    ),
    File("torchvision, maxvit_t", of_torchvision("maxvit_t"), plain("maxvit.pth"), foreign=True),
)


def tried(file: File, folder: Path) -> tuple[str, str]:
    """Return how ``file`` was opened, and what was said about it."""
    torch.manual_seed(0)
    try:
        model = file.build()
    except ImportError as error:
        return "not tried", f"no module {error.name}"
    path = file.write(folder, model)
    refusal = ""
    for flags in ({}, file.flags) if file.flags else ({},):
        try:
            loaded = read_model(path, **flags)
        except MhacutError as error:
            refusal = refusal or str(error).replace(str(path), path.name).replace(str(folder), "folder")
            continue
        check(file, model, loaded.model)
        told = "; ".join(note for note in loaded.notes if not note.startswith("weights are float16"))
        if not flags:
            return "no flag", told
        return " ".join(map(flag, flags.items())), refusal.split("\n")[0]
    return "refused", refusal.split("\n")[0]


def flag(item: tuple[str, Any]) -> str:
    name, value = item
    if isinstance(value, dict):
        return " ".join(
            [f"--{name.replace('_', '-').rstrip('s')}", *(f"{key}={one}" for key, one in value.items())]
        )
    return f"--{name} {value}"


@torch.no_grad()
def check(file: File, saved: Any, found: nn.Module) -> None:
    """Compare the model that was opened with the one that was saved."""
    if not file.foreign:
        state = found.state_dict()
        for name, tensor in saved.state_dict().items():
            assert torch.allclose(state[name].float(), tensor.float(), atol=1e-3), (file.name, name)
        return
    images = torch.randn(1, *timm.data.resolve_model_data_config(found)["input_size"])
    visual = getattr(saved, "visual", None)
    answer = visual(images) if visual is not None else file.answer(saved(images))
    assert torch.allclose(found(images), answer, atol=1e-4), file.name


def summary(rows: list[tuple[str, str, str]]) -> list[str]:
    """Return lines of a table that counts how files were opened, the most frequent way first."""
    counts: dict[str, int] = {}
    for _, how, said in rows:
        told = f"{how}: {said}" if how in ("refused", "not tried") else how
        counts[told] = counts.get(told, 0) + 1
    lines = [f"| {told} | {count} |" for told, count in sorted(counts.items(), key=lambda item: -item[1])]
    return [f"{len(rows)} files:", "", "| opened with | files |", "|---|---|", *lines]


def versions() -> str:
    """Name what the table was made with."""
    names = ("mhacut", "torch", "timm", "transformers", "torchvision", "open_clip_torch")
    found = []
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print a table of files and how they are opened.")
    parser.add_argument("pattern", nargs="?", default="*", help="names of rows, a glob")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the table there, counts first")
    asked = parser.parse_args()
    as_flags = flag_writer(InspectOptions.options())
    head = ["| file | opened with | said |", "|---|---|---|"]
    print("\n".join(head))
    rows: list[tuple[str, str, str]] = []
    for file in FILES:
        if not fnmatch.fnmatch(file.name, asked.pattern):
            continue
        with tempfile.TemporaryDirectory() as folder, options_written_by(as_flags):
            how, said = tried(file, Path(folder))
        rows.append((file.name, how, said.replace("|", "/")))
        print(line(rows[-1]), flush=True)
    print("\n" + "\n".join(summary(rows)))
    if asked.markdown is not None:
        title = ["# Checkpoint files, and how mhacut opened them", ""]
        made = [f"Made by `python examples/coverage/files.py --markdown FILE`, with {versions()}.", ""]
        asked.markdown.write_text("\n".join([*title, *made, *summary(rows), "", *head, *map(line, rows), ""]))


def line(row: tuple[str, str, str]) -> str:
    return f"| {' | '.join(row)} |"


if __name__ == "__main__":
    main()
