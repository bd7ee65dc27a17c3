"""The scripts in examples/benchmarks do what their first lines say, on images a few seconds old."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
DIGITS = BENCHMARKS.parent / "digits"
sys.path.insert(0, str(BENCHMARKS))  # the scripts import the package methods/ beside them


def script(name: str) -> Any:
    """The module of a script, not run."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def paint(folder: Path, *, classes: int = 2, per_class: int = 8, size: int = 32) -> Path:
    """A folder of images, each of the colour of its class and some noise."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(classes):
            (folder / split / f"class{label}").mkdir(parents=True)
            for index in range(per_class):
                pixels = generator.integers(0, 60, (size, size, 3)) + 180 * label // max(classes - 1, 1)
                Image.fromarray(pixels.astype(np.uint8)).save(
                    folder / split / f"class{label}" / f"{index}.png"
                )
    return folder


# --- train_cifar_vit.py ---


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return paint(tmp_path_factory.mktemp("images"))


@pytest.fixture
def train(monkeypatch):
    """The script, with a model small enough for a test."""
    module = script("train_cifar_vit")
    small = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 12, "num_heads": 3}
    monkeypatch.setattr(module, "MODEL_ARGS", small)
    yield module
    torch.use_deterministic_algorithms(False)


def train_flags(images: Path, output: Path) -> list[str]:
    flags = f"--data-dir {images} --output {output} --epochs 2 --plain-epochs 1 --batch 4 --warmup 1"
    return [*flags.split(), "--save-every", "1", "--lr", "1e-2"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopped_training_ends_with_the_bytes_of_one_that_was_not(
    train, images, tmp_path, monkeypatch, optimizer
) -> None:
    train.main([*train_flags(images, tmp_path / "whole"), "--optimizer", optimizer])
    step = train.Training.train_step
    for stop in (3, 6):  # in the distorted epoch, and in the plain one

        def stopping(self, stop=stop):
            if self.step == stop:
                raise KeyboardInterrupt
            return step(self)

        with monkeypatch.context() as patch:
            patch.setattr(train.Training, "train_step", stopping)
            with pytest.raises(KeyboardInterrupt):
                train.main([*train_flags(images, tmp_path / "parts"), "--optimizer", optimizer])
    train.main([*train_flags(images, tmp_path / "parts"), "--optimizer", optimizer])
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    told = (tmp_path / "parts" / "log.txt").read_text()
    assert "goes on at step 3 of 8" in told
    losses = [
        [
            line.split(",")[0]
            for line in (tmp_path / name / "log.txt").read_text().splitlines()
            if "epoch" in line
        ]
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_training_refuses_to_go_on_with_other_options(train, images, tmp_path) -> None:
    train.main(train_flags(images, tmp_path))
    with pytest.raises(SystemExit, match="--weight-decay"):
        train.main([*train_flags(images, tmp_path), "--weight-decay", "0.1"])


def test_training_goes_on_along_another_schedule(train, images, tmp_path) -> None:
    train.main(train_flags(images, tmp_path))
    flags = [*train_flags(images, tmp_path), "--epochs", "3"]
    train.main(flags)
    told = (tmp_path / "log.txt").read_text()
    assert "from step 8 on with {'epochs': 3" in told
    assert "epoch 3 of 3" in told


def test_training_starts_from_given_weights(train, images, tmp_path) -> None:
    train.main(train_flags(images, tmp_path / "first"))
    file = tmp_path / "first" / "model.safetensors"
    flags = [*train_flags(images, tmp_path / "second"), "--init", str(file), "--lr", "0"]
    train.main(flags)
    before, after = load_file(file), load_file(tmp_path / "second" / "model.safetensors")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, msg=name)


def test_a_vit_learns_from_a_network_trained_before(train, images, tmp_path) -> None:
    train.main([*train_flags(images, tmp_path / "teacher"), "--network", "resnet"])
    teacher = tmp_path / "teacher" / "model.safetensors"
    taught = [*train_flags(images, tmp_path / "taught"), "--teachers", str(teacher), "--teacher-share", "1"]
    train.main(taught)
    train.main(train_flags(images, tmp_path / "alone"))
    model, alone = (train.build_vit(2).eval() for _ in range(2))
    model.load_state_dict(load_file(tmp_path / "taught" / "model.safetensors"))
    alone.load_state_dict(load_file(tmp_path / "alone" / "model.safetensors"))
    resnet = train.load_network(teacher, 2)
    held = train.normalize(train.read_split(images / "val", 32)[0])
    with torch.no_grad():
        wanted, own, others = (net(held).softmax(1) for net in (resnet, model, alone))
    assert (own - wanted).abs().mean() < (others - wanted).abs().mean()
    with pytest.raises(SystemExit, match="--teachers"):
        train.main(train_flags(images, tmp_path / "taught"))


def test_augmented_images_are_shifted_or_flipped_ones(train) -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    changed = train.augment(train.normalize(images), cutout=0)
    padded = torch.nn.functional.pad(train.normalize(images), (4, 4, 4, 4))
    for before, after in zip(padded, changed, strict=True):
        views = [
            before[:, top : top + 32, left : left + 32].flip(-1)
            if flip
            else before[:, top : top + 32, left : left + 32]
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
        ]
        assert any(torch.equal(after, view) for view in views)


def test_cutout_greys_at_most_its_square(train) -> None:
    torch.manual_seed(0)
    images = torch.full((64, 3, 32, 32), 255, dtype=torch.uint8)
    changed = train.augment(train.normalize(images), cutout=8, padding=0)
    areas = (changed == 0).all(1).sum((1, 2))
    assert int(areas.max()) == 64
    assert int(areas.min()) >= 16  # the centre is inside: a quarter of the square at least


def test_soft_targets_sum_to_one(train) -> None:
    targets = train.smooth(torch.tensor([0, 2]), 4, 0.2)
    torch.testing.assert_close(targets, torch.tensor([[0.85, 0.05, 0.05, 0.05], [0.05, 0.05, 0.85, 0.05]]))


# --- compare.py and methods/ ---


@pytest.fixture(scope="module")
def compare():
    return script("compare")


@pytest.fixture(scope="module")
def methods():
    import methods.common

    return methods


def small_vit(**more: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    args = {"img_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **args, **more).eval().requires_grad_(False)
    for parameter in model.parameters():
        spread = 0.3 if parameter.dim() == 1 else 2 / parameter[0].numel() ** 0.5
        parameter += spread * torch.randn_like(parameter)
    return model


def task_of(model, share: float, **options: Any) -> Any:
    from methods.common import Task

    images = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return Task.of(model, (3, 16, 16), images, torch.arange(24) % 5, share, options)


def reread(slim, tmp_path: Path, dense, temperature: str) -> torch.nn.Module:
    from methods.common import read_slim, write_slim

    file = str(tmp_path / "slim.safetensors")
    write_slim(file, slim.model, slim.temperatures)
    return read_slim(dense, file, temperature)


def test_methods_are_chosen_by_glob(methods) -> None:
    assert [method.name for method in methods.chosen(["snp", "tp-l?-global"])] == [
        "snp",
        "tp-l1-global",
        "tp-l2-global",
    ]
    default = {method.name for method in methods.chosen([])}
    assert {"mhacut-nodata-auto-balanced", "corp", "vbp", "tp-hessian-isomorphic"} <= default
    assert "mhacut-nodata-auto-best" not in default
    with pytest.raises(ValueError, match="--methods tp-l3"):
        methods.chosen(["tp-l3"])


def test_scores_equal_their_definition(compare) -> None:
    torch.manual_seed(0)
    reference, logits, labels = torch.randn(9, 4), torch.randn(9, 4), torch.arange(9) % 4
    found = compare.score(reference, logits, labels)
    right = agree = kl = 0.0
    for dense, slim, label in zip(reference.tolist(), logits.tolist(), labels.tolist(), strict=True):
        p, q = np.exp(dense) / np.exp(dense).sum(), np.exp(slim) / np.exp(slim).sum()
        kl += float((p * np.log(p / q)).sum()) / 9
        right += 100 / 9 * (np.argmax(slim) == label)
        agree += 100 / 9 * (np.argmax(slim) == np.argmax(dense))
    expected = {"top1": right, "agreement": agree, "kl": kl, "images": 9}
    assert found == {name: pytest.approx(value) for name, value in expected.items()}
    assert compare.score(reference, reference, labels)["kl"] == 0


def make_setup(compare, checkpoint: Path, **other: Any) -> Any:
    about = {"model": None, "model_args": (), "data_dir": "d", "mean": None, "std": None}
    return compare.Setup(
        **{"checkpoint": str(checkpoint), **about, "calibration_images": 8, "seed": 1, **other}
    )


def make_row(compare, method: str, keep: float | None, top1: float, **scores: float) -> dict[str, Any]:
    from methods import METHODS

    found = {
        "flops": 500,
        "scores": {
            name: {"top1": top1, "agreement": 50.0, "kl": kl, "images": 9}
            for name, kl in (scores or {"own": 0.5}).items()
        },
        "best": compare.best_of({name: {"kl": kl} for name, kl in (scores or {"own": 0.5}).items()}),
        "checks": {},
    }
    process = compare.Process(wall_s=1.0, cpu_s=2.0, peak_mib=3.0, stdout="")
    return compare._row(METHODS.get(method), keep, found, 1000, process, {})


def test_a_table_is_made_in_parts(compare, tmp_path) -> None:
    checkpoint = tmp_path / "model.safetensors"
    checkpoint.write_bytes(b"weights")
    setup, machine, file = make_setup(compare, checkpoint), {"cpu": "one"}, str(tmp_path / "table.json")
    table = compare.Table.open(file, machine, setup)
    table.put(make_row(compare, "vbp", 50.0, 40.0))
    table.put(make_row(compare, "dense", None, 90.0))
    again = compare.Table.open(file, machine, setup)
    assert again.has("vbp", 50.0)
    assert not again.has("vbp", 37.5)
    again.put(make_row(compare, "corp", 37.5, 30.0))
    again.put(make_row(compare, "corp", 90.0, 80.0))
    again.put(make_row(compare, "vbp", 50.0, 41.0))  # made anew
    found = json.loads(Path(file).read_text())["rows"]
    assert [(row["method"], row["keep"], row["top1"]) for row in found] == [
        ("dense", None, 90.0),
        ("corp", 90.0, 80.0),
        ("corp", 37.5, 30.0),
        ("vbp", 50.0, 41.0),
    ]


def test_rows_of_other_things_are_not_mixed(compare, tmp_path) -> None:
    checkpoint, file = tmp_path / "model.safetensors", str(tmp_path / "table.json")
    checkpoint.write_bytes(b"weights")
    compare.Table.open(file, {"cpu": "one"}, make_setup(compare, checkpoint)).write(file)
    with pytest.raises(SystemExit, match="cpu 'one', this is 'two'"):
        compare.Table.open(file, {"cpu": "two"}, make_setup(compare, checkpoint))
    with pytest.raises(SystemExit, match="seed 1, this is 2"):
        compare.Table.open(file, {"cpu": "one"}, make_setup(compare, checkpoint, seed=2))
    checkpoint.write_bytes(b"other")
    with pytest.raises(SystemExit, match="checkpoint_sha256"):
        compare.Table.open(file, {"cpu": "one"}, make_setup(compare, checkpoint))


def test_the_better_temperature_is_reported(compare) -> None:
    row = make_row(compare, "tp-l1-uniform", 50.0, 40.0, dense=0.7, kept=0.6)
    assert (row["temperature"], row["kl"]) == ("kept", 0.6)
    text = compare.as_text([row, compare._empty_row(compare.METHODS["vbp"], 12.5, "37.0 % stay")])
    assert "scored at temperature kept (dense: 40.00 / 0.7000)" in text
    assert "VBP (own reference) 12.5%: out of reach, 37.0 % stay" in text
    assert "50.00%" in text


def test_rows_of_different_code_are_told(compare) -> None:
    rows = [make_row(compare, "corp", keep, 40.0) for keep in (50.0, 25.0)]
    assert "states of the code" not in compare.as_text(rows)
    assert "made by 2 states of the code" in compare.as_text([rows[0], {**rows[1], "code": "another"}])


def test_mhacut_is_run_as_a_user_would(compare, tmp_path) -> None:
    setup = make_setup(compare, Path("m.pth"), model="vit", model_args=("depth=6",), mean="0,0,0")
    method = compare.METHODS["mhacut-unlabelled-principal-fast"]
    command = " ".join(compare.mhacut_command(setup, method, 37.5, tmp_path / "o"))
    assert "prune m.pth --flops 37.5% " in command
    assert command.endswith(
        "--seed 1 --calibration-images 8 --model vit --model-arg depth=6 --mean 0,0,0 "
        "--no-labels --basis principal --effort fast --calibration-images 128 --data-dir d"
    )
    bare = compare.mhacut_command(setup, compare.METHODS["mhacut-nodata-auto-balanced"], 50.0, tmp_path / "o")
    assert "--data-dir" not in bare


@pytest.mark.parametrize("name", ["corp", "vbp", "snp"])
def test_references_meet_the_budget_and_survive_their_file(name, methods, tmp_path) -> None:
    import importlib

    from mhacut.surgery.flops import measure_flops

    dense = small_vit()
    task = task_of(dense, 0.8)
    before = copy.deepcopy(dense.state_dict())
    slim = importlib.import_module(f"methods.{name}").prune(task)
    read = reread(slim, tmp_path, dense, slim.temperatures[0])
    torch.testing.assert_close(read(task.images), slim.model(task.images))
    assert measure_flops(read, (3, 16, 16)) / task.table.dense == pytest.approx(0.8, rel=0.01)
    for key, tensor in dense.state_dict().items():
        assert torch.equal(tensor, before[key])
    with pytest.raises(methods.common.OutOfReachError, match="at least"):
        importlib.import_module(f"methods.{name}").prune(task_of(dense, 0.02))


def test_vbp_loses_nothing_where_activations_do_not_vary(methods) -> None:
    from methods.vbp import prune

    dense = small_vit()
    for block in dense.blocks:
        block.mlp.fc1.weight[::2] = 0  # half of the channels are constant, at a value of their own
    task = task_of(dense, 0.8)
    slim = prune(task)
    assert [block.mlp.fc1.out_features < 96 for block in slim.model.blocks] == [True, True]
    torch.testing.assert_close(slim.model(task.images), dense(task.images), rtol=1e-4, atol=1e-4)


def test_corp_loses_nothing_where_channels_repeat(methods) -> None:
    from methods.corp import prune

    dense = small_vit()
    for block in dense.blocks:
        for rows in (block.mlp.fc1.weight, block.mlp.fc1.bias):
            rows[48:] = rows[:48]
        for tensor in (block.attn.qkv.weight, block.attn.qkv.bias):
            query_key = tensor[:48].unflatten(0, (2, 2, 2, 6))  # q or k, head, half, channel
            query_key[:, :, 1] = 0.3 * query_key[:, :, 0]
        # less energy, so the second half is what goes
        block.mlp.fc2.weight[:, 48:] *= 0.1
    task = task_of(dense, 0.75)
    slim = prune(task)
    plain = copy.deepcopy(dense)
    for block in plain.blocks:
        block.mlp.fc2.weight[:, 48:] = 0
    expected = dense(task.images)
    error = (slim.model(task.images) - expected).abs().max() / expected.abs().max()
    without = (plain(task.images) - expected).abs().max() / expected.abs().max()
    assert error < 0.02 * without


def test_corp_takes_a_vit_without_qkv_bias(methods) -> None:
    from methods.corp import prune

    task = task_of(small_vit(qkv_bias=False), 0.75)
    assert prune(task).model(task.images).isfinite().all()


def test_the_dense_temperature_is_that_of_dead_channels(methods, tmp_path) -> None:
    """Channels at zero may go: with the dense temperature nothing changes, with the kept one it does."""
    from methods.common import Slim, cut_to

    dense = small_vit()
    for block in dense.blocks:
        for tensor in (block.attn.qkv.weight, block.attn.qkv.bias):
            tensor.view(3, 2, 12, -1)[:2, :, 6:] = 0
    task = task_of(dense, 0.5)
    kept = {unit.key: torch.arange(6).expand(2, 6) for unit in task.prunable.units(("qk",))}
    slim = Slim(
        cut_to(dense, task.prunable, kept, keep_temperature=False), temperatures=("kept", "dense"), checks={}
    )
    expected = dense(task.images)
    same = reread(slim, tmp_path, dense, "dense")(task.images)
    torch.testing.assert_close(same, expected, rtol=1e-4, atol=1e-5)
    other = reread(slim, tmp_path, dense, "kept")(task.images)
    torch.testing.assert_close(other, slim.model(task.images))
    assert (other - expected).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spread", ["uniform", "global", "isomorphic"])
@pytest.mark.parametrize("criterion", ["l1", "l2", "taylor", "hessian"])
def test_torch_pruning_meets_the_budget(criterion, spread, methods, tmp_path) -> None:
    pytest.importorskip("torch_pruning")
    from methods.torch_pruning_timm import prune

    from mhacut.surgery.flops import measure_flops

    dense = timm.create_model(f"local-dir:{DIGITS / 'model'}", pretrained=True).eval().requires_grad_(False)
    images = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    options = {"criterion": criterion, "spread": spread}
    task = methods.common.Task.of(dense, (3, 32, 32), images, torch.arange(20) % 10, 0.6, options)
    slim = prune(task)
    assert float(slim.checks["differs from masked dense model by"]) < 1e-5
    read = reread(slim, tmp_path, dense, "dense")
    torch.testing.assert_close(read(images), slim.model(images), rtol=1e-4, atol=1e-4)
    assert measure_flops(read, (3, 32, 32)) / task.table.dense == pytest.approx(0.6, rel=0.005)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_hessian_is_summed_over_images(methods) -> None:
    pytest.importorskip("torch_pruning")
    from methods.torch_pruning_timm import importance_of

    dense = small_vit().requires_grad_(True)
    task = task_of(dense, 0.5)
    images, labels = task.images[:3], task.labels[:3]
    importance = importance_of("hessian", dense, images, labels)
    weight = dense.blocks[0].mlp.fc1.weight
    expected = torch.zeros_like(weight)
    for image, label in zip(images, labels, strict=True):
        loss = torch.nn.functional.cross_entropy(dense(image[None]), label[None])
        expected += torch.autograd.grad(loss, weight)[0] ** 2
    torch.testing.assert_close(importance._accu_grad[weight], expected)
    assert importance._counter[weight] == 3


@pytest.mark.slow
def test_the_command_compares_on_the_digits(compare, tmp_path, capsys) -> None:
    flags = (
        f"--checkpoint {DIGITS / 'model'} --data-dir {DIGITS / 'images'} --keep 50 --calibration-images 64"
    )
    flags += f" --merge {tmp_path / 'table.json'} --keep-models {tmp_path / 'models'}"
    assert compare.main([*flags.split(), "--methods", "snp"]) == 0
    first = json.loads((tmp_path / "table.json").read_text())
    assert compare.main([*flags.split(), "--methods", "snp", "mhacut-nodata-auto-fast"]) == 0
    document = json.loads((tmp_path / "table.json").read_text())
    assert [row["method"] for row in document["rows"]] == ["dense", "mhacut-nodata-auto-fast", "snp"]
    assert document["rows"][2] == first["rows"][1]  # reused
    assert document["validation_images"] == 300
    assert document["rows"][0]["top1"] == pytest.approx(97.67, abs=0.01)
    assert document["rows"][1]["ratio"] <= 0.5
    snp = document["rows"][2]  # judged at both temperatures by images of all classes
    assert [other["images"] for other in snp["other_temperatures"].values()] == [300]
    assert all(other["kl"] >= snp["kl"] for other in snp["other_temperatures"].values())
    assert {path.name for path in (tmp_path / "models").iterdir()} == {
        "mhacut-nodata-auto-fast-50.safetensors",
        "snp-50.safetensors",
    }
    assert "mhacut, no data, auto, fast" in capsys.readouterr().out


def test_the_setup_is_told_without_paths(compare, tmp_path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"x")
    setup = make_setup(compare, tmp_path / "m.safetensors", data_dir=str(tmp_path / "images"))
    assert str(tmp_path) not in json.dumps(setup.told())
    assert compare.setup_of({"setup": json.loads(json.dumps(asdict(setup)))}) == setup


# --- ablation.py ---


def test_an_ablation_that_cannot_begin_says_why_and_ends(tmp_path, capsys) -> None:
    ablation = script("ablation")
    flags = ["--merge", str(tmp_path / "rows"), "--checkpoint", "x", "--data-dir", "y"]
    assert ablation.main([*flags, "--methods", "nosuch"]) == 2
    assert "nosuch" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        ablation.main(["--help"])
    assert "ablation-full-no-repair" in capsys.readouterr().out


def test_of_one_seed_there_is_no_spread() -> None:
    ablation = script("ablation")
    row = {"method": "ablation-full", "title": "all", "keep": 50.0, "cpu_s": 9.0}
    tables = [{"rows": [{**row, "top1": top1, "agreement": 90.0, "kl": 0.5}]} for top1 in (70.0, 72.0)]
    assert ablation.as_text(tables[:1], ["ablation-full"]).endswith(
        "| 50 % | all | 70.00 | 90.00 | 0.5000 | 9 |"
    )
    assert "| 71.00 ± 1.00 | 90.00 ± 0.00 |" in ablation.as_text(tables, ["ablation-full"])


def test_who_lacks_torch_pruning_is_told_before_the_work(monkeypatch, capsys) -> None:
    compare = script("compare")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flags = ["--checkpoint", "x", "--data-dir", "y", "--methods", "corp", "tp-taylor-uniform"]
    assert compare.main(flags) == 2
    assert "pip install 'mhacut[bench]'" in capsys.readouterr().err


# --- finetune.py ---


@pytest.fixture
def finetune():
    yield script("finetune")
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def slim_folder(tmp_path_factory) -> Path:
    """Dense file, images of its size, and two kept models."""
    from methods.common import Slim, cut_to, write_slim
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("slim")
    dense = small_vit()
    save_file(dense.state_dict(), folder / "dense.safetensors")
    paint(folder / "images", classes=5, per_class=4, size=16)
    (folder / "models").mkdir()
    task = task_of(dense, 0.5)
    for name, width in (("corp", 20), ("vbp", 30)):
        kept = {unit.key: torch.arange(width)[None] for unit in task.prunable.units(("hidden",))}
        slim = Slim(cut_to(dense, task.prunable, kept, keep_temperature=True), ("own",), {})
        write_slim(str(folder / "models" / f"{name}-50.safetensors"), slim.model, slim.temperatures)
    return folder


def finetune_flags(folder: Path, runs: Path) -> list[str]:
    args = {"img_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2}
    flags = f"--checkpoint {folder / 'dense.safetensors'} --model vit_tiny_patch16_224 --mean 0.5,0.5,0.5"
    flags += f" --std 0.5,0.5,0.5 --data-dir {folder / 'images'} --models {folder / 'models'} --keep 50"
    flags += f" --steps 6 3 --seeds 0 1 --batch 8 --lr 1e-2 --save-every 1 --runs {runs}"
    return [*flags.split(), *(f"--model-arg={name}={value}" for name, value in args.items())]


def results_of(runs: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in runs.read_text().splitlines()[1:]]
    for line in found:
        del line["cpu_s"]
    return found


def test_stopped_fine_tuning_ends_with_the_numbers_of_one_that_was_not(
    finetune, slim_folder, tmp_path, monkeypatch, capsys
) -> None:
    few = ["--methods", "corp", "--steps", "4", "2"]
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    finetune.main([*finetune_flags(slim_folder, whole), *few])
    table = capsys.readouterr().out
    step = finetune.Training.train_step
    taken = []

    def stopping(self):
        if len(taken) in (3, 21):
            taken.append("stopped")
            raise KeyboardInterrupt
        taken.append("step")
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(finetune.Training, "train_step", stopping)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                finetune.main([*finetune_flags(slim_folder, parts), *few])
            with open(parts, "a") as file:
                file.write('{"run": {"meth')  # as a crash would leave it
        finetune.main([*finetune_flags(slim_folder, parts), *few])
    assert taken.count("step") == 2 * 2 * 2 * (4 + 2)  # starts, teachers, seeds: no step twice
    assert results_of(parts) == results_of(whole)
    assert len(results_of(whole)) == 16
    assert not (tmp_path / "parts.jsonl.state").exists()
    assert capsys.readouterr().out == table
    assert "2 steps" in table
    assert "(2)" in table


def test_scratch_is_the_same_architecture_without_the_weights(finetune, slim_folder) -> None:
    dense = small_vit()
    run = finetune.Run("corp", 50.0, "pruned", False, 3, 0)
    pruned = finetune.slim_model(dense, slim_folder / "models", run)
    scratch = finetune.slim_model(
        dense, slim_folder / "models", finetune.Run(**{**asdict(run), "start": "scratch"})
    )
    for (name, one), (_, other) in zip(
        pruned.state_dict().items(), scratch.state_dict().items(), strict=True
    ):
        assert one.shape == other.shape
        assert not torch.equal(one, other), name
    assert all(parameter.requires_grad for parameter in scratch.parameters())


def test_a_teacher_answers_each_batch_of_a_seed_once(finetune) -> None:
    asked = []

    def dense(images):
        asked.append(images)
        return images.flatten(1)

    teacher = finetune.Teacher(dense, amp=False)
    batches = torch.rand(4, 2, 3, generator=torch.Generator().manual_seed(0))
    places = [(0, 0), (0, 1), (0, 0), (1, 0), (1, 0)]
    answers = [teacher.answer(seed, step, batches[2 * seed + step]) for seed, step in places]
    for (seed, step), answer in zip(places, answers, strict=True):
        torch.testing.assert_close(answer, batches[2 * seed + step].log_softmax(1))
    assert len(asked) == 3


def test_runs_of_other_recipes_are_not_mixed(finetune, slim_folder, tmp_path) -> None:
    flags = [
        *finetune_flags(slim_folder, tmp_path / "runs"),
        "--steps",
        "1",
        "--seeds",
        "0",
        "--teacher",
        "off",
    ]
    finetune.main(flags)
    with pytest.raises(SystemExit, match="made with recipe"):
        finetune.main([*flags, "--lr", "0.1"])


def test_the_table_of_runs_has_mean_and_spread(finetune) -> None:
    def result(method: str, seed: int, top1: float) -> dict[str, Any]:
        run = asdict(finetune.Run(method, 50.0, "pruned", True, 500, seed))
        return {"run": run, "before": {"top1": 40.0}, "after": {"top1": top1}}

    text = finetune.as_text(
        [result("vbp", 0, 70.0), result("vbp", 1, 72.0), result("corp", 0, 60.0)], [500, 100]
    )
    assert [line.split() for line in text.splitlines()] == [
        ["method", "start", "keep", "teacher", "before", "100", "steps", "500", "steps"],
        ["corp", "pruned", "50%", "on", "40.00", "-", "60.00", "(1)"],
        ["vbp", "pruned", "50%", "on", "40.00", "-", "71.00", "+-1.41", "(2)"],
    ]


# --- overhead.py ---


@pytest.mark.slow
def test_the_cost_of_pruning_is_told_per_stage(monkeypatch, tmp_path, capsys) -> None:
    overhead = script("overhead")
    file = tmp_path / "rows.json"
    flags = ["--models", "test_vit", "--depths", "2", "--images", "4", "--threads", "1"]
    flags += ["--merge", str(file)]
    overhead.main(flags)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("| test_vit, 2 blocks | balanced | 4 |")
    (row,) = json.loads(file.read_text()).values()
    assert set(overhead.STAGES) - set(row["seconds"]) == {"tuning", "swapping channels"}
    # Not less: on Linux a child starts with the peak of its parent, which here is large.
    assert 0 < row["start"]["peak_mib"] <= row["all"]["peak_mib"]
    monkeypatch.setattr(overhead, "measure", None)  # what is in the file is not run again
    overhead.main(flags)
    assert capsys.readouterr().out.splitlines()[-1] == line
