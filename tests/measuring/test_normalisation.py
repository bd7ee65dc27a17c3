"""A wrong normalisation of images is seen where another usual one is clearly better, and nowhere else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn

import mhacut
from helpers.checkpoints import ARGS, tiny
from helpers.cli import FAST, run, tree
from helpers.data import write_split
from mhacut.checkpoint.load import open_checkpoint
from mhacut.checkpoint.preprocessing import Provenance, provenance, resolve_preprocessing, with_hint
from mhacut.data import Preprocessing
from mhacut.measuring.normalisation import USUAL, BetterNormalisations, better_normalisation
from mhacut.options.base import PreprocessingOptions

CPU = torch.device("cpu")
IMAGENET, INCEPTION, CLIP, CIFAR = USUAL


def normalised(pixels, by):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (by.mean, by.std))
    return (pixels - mean) / std


class Hundredths(nn.Module):
    """Right about images normalised by ``trained``: the class is the first pixel in hundredths."""

    def __init__(self, trained) -> None:
        super().__init__()
        self.trained, self.passes = trained, 0

    def forward(self, images):
        self.passes += len(images)
        pixel = images[:, 0, 0, 0] * self.trained.std[0] + self.trained.mean[0]
        return -((pixel[:, None] * 100 - torch.arange(101.0)) ** 2)


def sample(by, count=256, size=50):
    labels = torch.arange(count) % 101
    pixels = (labels / 100).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    batches = list(zip(normalised(pixels, by).split(size), labels.split(size), strict=True))
    return lambda: batches


@pytest.mark.parametrize("trained", USUAL, ids=lambda usual: usual.name)
@pytest.mark.parametrize("size", [1, 50, 300])
def test_the_one_of_training_is_found(trained, size):
    taken = IMAGENET if trained is INCEPTION else INCEPTION
    model = Hundredths(trained)
    better = better_normalisation(model, sample(taken, size=size), taken.mean, taken.std, CPU)
    assert better.ranked[0] == (trained, 100)
    assert better.own_top1 < 60
    assert better.images == 256


@pytest.mark.parametrize("trained", USUAL, ids=lambda usual: usual.name)
def test_a_right_one_is_left_alone_at_the_cost_of_a_pass(trained):
    model = Hundredths(trained)
    assert better_normalisation(model, sample(trained), trained.mean, trained.std, CPU) is None
    assert model.passes == 64 * len(USUAL)


@pytest.mark.parametrize(
    ("wrong", "told", "certain"), [(4, False, False), (7, True, False), (10, True, False), (11, True, True)]
)
def test_what_may_be_chance_is_not_told(wrong, told, certain):
    """Of the 192 images that judge, 3, 6, 9 or 10 are right only with another normalisation."""

    class WrongAboutOnes(nn.Module):
        def forward(self, images):
            answers = torch.zeros(len(images), 2)
            answers[:, 1] = images[:, 2, 0, 0] == 1
            return answers

    images = torch.zeros(256, 3, 2, 2)
    images[[0, *(number for number in range(16) if number % 4)][:wrong], 2] = 1
    batches = [(images, torch.zeros(256, dtype=torch.long))]
    better = better_normalisation(WrongAboutOnes(), lambda: batches, INCEPTION.mean, INCEPTION.std, CPU)
    assert (better is not None) == told
    assert (better is not None and better.certain) == certain


def test_few_images_or_other_channels_say_nothing():
    model = Hundredths(IMAGENET)
    assert better_normalisation(model, sample(INCEPTION, 2), INCEPTION.mean, INCEPTION.std, CPU) is None
    assert better_normalisation(model, sample(INCEPTION), (0.5,), (0.5,), CPU) is None
    assert model.passes <= 8


# --- where a preprocessing comes from ---


def origins(path, override=None, **hints):
    opened, override = open_checkpoint(path, **hints), override or PreprocessingOptions()
    found = provenance(opened, override)
    return found, found.describe(resolve_preprocessing(opened, override))


def test_a_bare_file_does_not_say(tiny_vit):
    found, text = origins(tiny_vit.path, **tiny_vit.options)
    assert not found.normalisation_is_stated
    assert found.origins["mean"] == found.origins["interpolation"] == "default"
    assert (found.origins["input_size"], found.origins["crop_pct"]) == ("model", "size")
    assert f"std 0.5,0.5,0.5 (timm's default for {tiny_vit.architecture}; the file has none)" in text
    assert "32x32 (of the model); crop 1 center (small images are not cropped)" in text


def test_a_tag_says(tiny_vit):
    tag = f"{tiny_vit.architecture}.augreg_in21k"
    found, text = origins(tiny_vit.path, model=tag, model_args=tiny_vit.args)
    assert found.normalisation_is_stated
    assert "(timm's, for the tag in model)" in text


def test_nothing_is_tried_where_the_file_says():
    def never():
        raise AssertionError

    names = Preprocessing.__dataclass_fields__
    images = Preprocessing((3, 2, 2), CLIP.mean, CLIP.std, "bicubic", 1.0, "center")
    sure = Provenance(dict.fromkeys(names, "file"), "vit")
    assert with_hint(sure, Hundredths(IMAGENET), images, never, CPU) is sure


def test_a_timm_folder_says_what_it_says(tmp_path):
    save_for_hf(tiny(), tmp_path / "folder", model_args=ARGS)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    config["pretrained_cfg"] = {"mean": [0.1, 0.2, 0.3], "input_size": [3, 32, 32], "crop_pct": 0.8}
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    found, text = origins(tmp_path / "folder")
    assert (found.origins["mean"], found.origins["crop_pct"]) == ("file", "file")
    assert found.origins["std"] == "default"
    assert not found.normalisation_is_stated
    assert "crop 0.8 center, mean 0.1,0.2,0.3 (from the file)" in text


def test_a_slim_file_keeps_what_its_cut_assumed(tiny_vit, tmp_path):
    """And a flag of one command is what the file says to the next."""
    out = tmp_path / "slim.safetensors"
    options = {
        "model": tiny_vit.architecture,
        "model_args": tiny_vit.args,
        "latency": False,
        "effort": "fast",
    }
    mhacut.prune(tiny_vit.path, flops="60%", output=out, std=(0.2,) * 3, calibration_images=8, **options)
    found, text = origins(out)
    assert (found.origins["mean"], found.origins["std"]) == ("assumed", "file")
    assert f"mean 0.5,0.5,0.5 (from the file, which used timm's default for {found.architecture})" in text


DIGITS = Path(__file__).parents[2] / "examples" / "digits"


@pytest.fixture
def digits_of_imagenet(tmp_path):
    """A bare file, and its flags, of a model that reads digits normalised by the statistics of ImageNet."""
    tensors = load_file(DIGITS / "model" / "model.safetensors")
    weight, bias = (tensors[f"patch_embed.proj.{name}"] for name in ("weight", "bias"))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET.mean, IMAGENET.std))
    tensors["patch_embed.proj.bias"] = bias + (weight * (mean - 0.5) / 0.5).sum(dim=(1, 2, 3))
    tensors["patch_embed.proj.weight"] = weight * std / 0.5
    save_file(tensors, tmp_path / "bare.safetensors")
    return [tmp_path / "bare.safetensors", "--model", "vit_tiny_patch16_224", "--model-arg", "num_heads=3"]


@pytest.mark.slow
def test_nothing_wrong_is_written_in_silence(digits_of_imagenet, tmp_path):
    """Without labels nothing is seen; with them, what writes a file stops, and names the flags to give."""
    for image in DIGITS.glob("images/*/*/*[0-2].png"):
        place = tmp_path / image.relative_to(DIGITS)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, place)
    slim, data = tmp_path / "slim.safetensors", ["--data-dir", tmp_path / "images", "--workers", "0"]
    prune = ["prune", *digits_of_imagenet, *data, "--flops", "60%", "--no-latency", "--eval-images", "0"]
    few = ["--calibration-images", "8", "--effort", "fast", "--scope", "attention"]
    assert run(*prune, *few, "--no-labels", "-o", slim).exit_code == 0
    tuned = ["finetune", slim, "--steps", "1", "-o", tmp_path / "run", *data]
    before = tree(tmp_path)
    for command in ([*prune, "-o", tmp_path / "other.safetensors"], tuned):
        stopped = run(*command)
        assert stopped.exit_code == 2
        assert "or --mean 0.5,0.5,0.5 to keep" in stopped.stderr
        flags = stopped.stderr.partition(" %, with ")[2].split()[:4]
        assert flags[::2] == ["--mean", "--std"]
    assert tree(tmp_path) == before
    measured = run("evaluate", slim, *data)
    assert (measured.exit_code, "top-1 on " in measured.stdout) == (0, True)
    followed = run(*prune, *few, "-o", slim, "--overwrite", *flags)
    assert followed.exit_code == 0, followed.stderr


def test_every_output_says_it(tiny_vit, tmp_path, monkeypatch):
    better = BetterNormalisations(((CLIP, 76.2), (IMAGENET, 76.0)), 50.65, 256, certain=False)
    monkeypatch.setattr("mhacut.checkpoint.preprocessing.better_normalisation", lambda *_: better)
    for split in ("train", "val"):
        write_split(tmp_path / split, map(str, range(7)), per_class=2)
    page, out = tmp_path / "page.html", tmp_path / "slim.safetensors"
    data = ["--data-dir", tmp_path, "--workers", "0"]
    hint = "with --mean 0.48145466,0.4578275,0.40821073 --std "
    begun = ["prune", *tiny_vit.flags, "--flops", "60%", "-o", out, "--report", page, *data, *FAST]
    result = run(*begun)
    assert result.exit_code == 0, result.stderr
    assert hint in result.stdout
    assert hint in result.stderr  # before the search
    assert "preprocessing: 32x32 (of the model)" in result.stdout
    assert hint in page.read_text()
    assert "Preprocessing: 32x32" in page.read_text()
    tuned = ["finetune", out, "--steps", "1", "--batch-size", "7", "-o", tmp_path / "run"]
    for command in (["evaluate", out], tuned):
        result = run(*command, *data, "--json")
        assert result.exit_code == 0, result.stderr
        document = json.loads(result.stdout)
        assert hint in document["provenance"]["preprocessing_hint"]
        assert document["provenance"]["preprocessing_from"]["mean"] == "assumed"
        assert document["preprocessing"]["mean"] == [0.5, 0.5, 0.5]  # nothing is switched
    assert origins(tmp_path / "run" / "last.safetensors")[0].origins["std"] == "assumed"
