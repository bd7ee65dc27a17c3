"""``compare.py``, the methods that it compares, and ``ablation.py``."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from helpers.benchmarks import DIGITS, SMALL_VIT, paint, script, small_vit, task_of
from helpers.files import save_dense


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


def test_scores_equal_their_definition(scores) -> None:
    torch.manual_seed(0)
    reference, logits, labels = torch.randn(9, 4), torch.randn(9, 4), torch.arange(9) % 4
    found = scores.score(reference, logits, labels)
    right = agree = kl = 0.0
    for dense, slim, label in zip(reference.tolist(), logits.tolist(), labels.tolist(), strict=True):
        p, q = np.exp(dense) / np.exp(dense).sum(), np.exp(slim) / np.exp(slim).sum()
        kl += float((p * np.log(p / q)).sum()) / 9
        right += 100 / 9 * (np.argmax(slim) == label)
        agree += 100 / 9 * (np.argmax(slim) == np.argmax(dense))
    expected = {"top1": right, "agreement": agree, "kl": kl, "images": 9}
    assert found == {name: pytest.approx(value) for name, value in expected.items()}
    assert scores.score(reference, reference, labels)["kl"] == 0


def test_halves_are_scored_beside_the_whole(scores, compare_table) -> None:
    torch.manual_seed(0)
    reference, logits, labels = torch.randn(9, 4), torch.randn(9, 4), torch.arange(9) % 4
    row = {**scores.scores_of(reference, logits, labels), "title": "x", "ratio": 0.5, "cpu_s": 3.0}
    assert scores.of_half(row, "all") == row
    odd = scores.of_half(row, "odd")
    places = torch.tensor([1, 3, 5, 7])
    expected = scores.score(reference[places], logits[places], labels[places])
    assert {name: odd[name] for name in expected} == expected
    assert scores.of_half(row, "even")["images"] == 5
    line = compare_table.as_markdown([{**odd, "latency_ratio": 0.7}]).splitlines()[-1]
    scores = f"{odd['top1']:.2f} | {odd['agreement']:.2f} | {odd['kl']:.4f}"
    assert line == f"| x | 50.0 % | {scores} | 0.70 | 3 |"


def test_a_subject_stands_for_its_flags(compare, capsys) -> None:
    from subjects import SUBJECTS, complete

    parser = compare.build_parser()
    asked = parser.parse_args(["--subject", "cifar", "--root", "data", "--mean", "0,0,0"])
    complete(parser, asked)
    assert (asked.checkpoint, asked.data_dir) == ("data/vit_tiny_d6_cifar10.safetensors", "data/cifar10")
    assert asked.model_arg == list(SUBJECTS["cifar"].model_args)
    assert (asked.mean, asked.std) == ("0,0,0", SUBJECTS["cifar"].std)  # a flag that was given wins
    bare = parser.parse_args(["--data-dir", "d"])
    with pytest.raises(SystemExit):
        complete(parser, bare)
    assert "--subject" in capsys.readouterr().err


def make_setup(checkpoint: Path, **other: Any) -> Any:
    from setups import Setup

    about = {"model": None, "model_args": (), "data_dir": "d", "mean": None, "std": None}
    return Setup(**{"checkpoint": str(checkpoint), **about, "calibration_images": 8, "seed": 1, **other})


def make_row(method: str, keep: float | None, top1: float, **kls: float) -> dict[str, Any]:
    from compare_table import filled_row
    from methods import METHODS
    from process import Process
    from scores import best_of

    found = {
        "flops": 500,
        "scores": {
            name: {"top1": top1, "agreement": 50.0, "kl": kl, "images": 9}
            for name, kl in (kls or {"own": 0.5}).items()
        },
        "best": best_of({name: {"kl": kl} for name, kl in (kls or {"own": 0.5}).items()}),
        "checks": {},
    }
    process = Process(wall_s=1.0, cpu_s=2.0, peak_mib=3.0, stdout="")
    return filled_row(METHODS.get(method), keep, found, 1000, process, {})


def test_a_table_is_made_in_parts(compare_table, tmp_path) -> None:
    checkpoint = tmp_path / "model.safetensors"
    checkpoint.write_bytes(b"weights")
    setup, machine, file = make_setup(checkpoint), {"cpu": "one"}, str(tmp_path / "table.json")
    table = compare_table.Table.open(file, machine, setup)
    table.put(make_row("vbp", 50.0, 40.0))
    table.put(make_row("dense", None, 90.0))
    again = compare_table.Table.open(file, machine, setup)
    assert again.has("vbp", 50.0)
    assert not again.has("vbp", 37.5)
    again.put(make_row("corp", 37.5, 30.0))
    again.put(make_row("corp", 90.0, 80.0))
    again.put(make_row("vbp", 50.0, 41.0))  # made anew
    found = json.loads(Path(file).read_text())["rows"]
    assert [(row["method"], row["keep"], row["top1"]) for row in found] == [
        ("dense", None, 90.0),
        ("corp", 90.0, 80.0),
        ("corp", 37.5, 30.0),
        ("vbp", 50.0, 41.0),
    ]


def test_rows_of_other_things_are_not_mixed(compare_table, tmp_path) -> None:
    checkpoint, file = tmp_path / "model.safetensors", str(tmp_path / "table.json")
    checkpoint.write_bytes(b"weights")
    compare_table.Table.open(file, {"cpu": "one"}, make_setup(checkpoint)).write(file)
    with pytest.raises(SystemExit, match="cpu 'one', this is 'two'"):
        compare_table.Table.open(file, {"cpu": "two"}, make_setup(checkpoint))
    with pytest.raises(SystemExit, match="seed 1, this is 2"):
        compare_table.Table.open(file, {"cpu": "one"}, make_setup(checkpoint, seed=2))
    checkpoint.write_bytes(b"other")
    with pytest.raises(SystemExit, match="checkpoint_sha256"):
        compare_table.Table.open(file, {"cpu": "one"}, make_setup(checkpoint))


def test_the_better_temperature_is_reported(compare_table, methods) -> None:
    row = make_row("tp-l1-uniform", 50.0, 40.0, dense=0.7, kept=0.6)
    assert (row["temperature"], row["kl"]) == ("kept", 0.6)
    text = compare_table.as_text([row, compare_table.empty_row(methods.METHODS["vbp"], 12.5, "37.0 % stay")])
    assert "scored at temperature kept (dense: 40.00 / 0.7000)" in text
    assert "VBP (own reference) 12.5%: out of reach, 37.0 % stay" in text
    assert "50.00%" in text


def test_rows_of_different_code_are_marked(compare_table) -> None:
    rows = [make_row("corp", keep, 40.0) for keep in (50.0, 25.0)]
    assert "states of the code" not in compare_table.as_text(rows)
    assert "made by 2 states of the code" in compare_table.as_text([rows[0], {**rows[1], "code": "another"}])


def test_mhacut_is_run_as_a_user_would(compare, methods, tmp_path) -> None:
    setup = make_setup(Path("m.pth"), model="vit", model_args=("depth=6",), mean="0,0,0")
    method = methods.METHODS["mhacut-unlabelled-principal-fast"]
    command = " ".join(compare.mhacut_command(setup, method, 37.5, tmp_path / "o"))
    assert "prune m.pth --flops 37.5% " in command
    assert command.endswith(
        "--seed 1 --calibration-images 8 --model vit --model-arg depth=6 --mean 0,0,0 "
        "--no-labels --basis principal --effort fast --calibration-images 128 --data-dir d"
    )
    bare = compare.mhacut_command(setup, methods.METHODS["mhacut-nodata-auto-balanced"], 50.0, tmp_path / "o")
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


def merged_slowly(x, keys, sizes, count: int):
    """ToMe's rule for one image, token by token: [N, C], [N, d], [N]."""
    keys = keys / keys.norm(dim=1, keepdim=True)
    even, odd = range(0, len(x), 2), range(1, len(x), 2)
    partner = {a: max(odd, key=lambda b, a=a: float(keys[a] @ keys[b])) for a in even if a > 0}
    gone = sorted(partner, key=lambda a: -float(keys[a] @ keys[partner[a]]))[:count]
    groups = [[a] for a in even if a not in gone]
    groups += [[b, *(a for a in gone if partner[a] == b)] for b in odd]
    weights = [sizes[group].sum() for group in groups]
    means = [(x[group] * sizes[group, None]).sum(0) / sizes[group].sum() for group in groups]
    return torch.stack(means), torch.stack(weights)


@pytest.mark.parametrize(("tokens", "count"), [(9, 3), (8, 3), (9, 0), (7, 100)])
def test_tokens_are_merged_by_the_rule_of_tome(methods, tokens, count) -> None:
    from methods.merging import merge

    generator = torch.Generator().manual_seed(tokens)
    x, keys, sizes = (
        torch.rand(2, tokens, *more, generator=generator, dtype=torch.float64) + offset
        for more, offset in (((5,), 0), ((3,), -0.5), ((), 0.5))
    )
    merged, found = merge(x, keys, sizes, count)
    assert merged.shape[1] == tokens - min(count, (tokens - 1) // 2)
    for image in range(2):
        expected = merged_slowly(x[image], keys[image], sizes[image], count)
        torch.testing.assert_close((merged[image], found[image]), expected)
        torch.testing.assert_close(merged[image, 0], x[image, 0])  # the class token


def test_merging_alike_tokens_loses_nothing(methods) -> None:
    """Proportional attention: tokens that repeat weigh as much merged as apart."""
    from methods.merging import merge_tokens, merged_of

    dense = small_vit()
    dense.pos_embed[:, 1:] = 0
    patch = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    images = patch.repeat(1, 1, 4, 4)  # 16 patches alike
    merging = copy.deepcopy(dense)
    merge_tokens(merging, [8, 4])
    assert merged_of(copy.deepcopy(merging)) == [8, 4]
    torch.testing.assert_close(merging(images), dense(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(SystemExit, match="class token"):
        merge_tokens(small_vit(global_pool="avg"), [1, 1])


def test_tome_meets_the_budget_and_survives_its_file(methods, tmp_path) -> None:
    from methods.tome import prune

    from mhacut.surgery.flops import measure_flops

    dense = small_vit()
    task = task_of(dense, 0.7)
    slim = prune(task)
    read = reread(slim, tmp_path, dense, "own")
    torch.testing.assert_close(read(task.images), slim.model(task.images))
    assert measure_flops(read, (3, 16, 16)) / task.table.dense == pytest.approx(0.7, abs=0.03)
    assert (read(task.images) - dense(task.images)).abs().max() > 0.01
    with pytest.raises(methods.common.OutOfReachError, match="at least"):
        prune(task_of(dense, 0.02))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("temperature", ["dense", "kept"])
def test_tome_takes_the_rest_of_what_torch_pruning_cuts(methods, tmp_path, temperature) -> None:
    pytest.importorskip("torch_pruning")
    from methods.tome import prune

    from mhacut.surgery.flops import measure_flops

    dense = small_vit()
    channels = {"criterion": "taylor", "spread": "uniform", "share": 0.9}
    task = task_of(dense, 0.6, channels=channels)
    slim = prune(task)
    read = reread(slim, tmp_path, dense, temperature)
    same = torch.allclose(read(task.images), slim.model(task.images), rtol=1e-4, atol=1e-4)
    assert same == (temperature == "dense")  # plain attention reads the scale that was left
    assert measure_flops(read, (3, 16, 16)) / task.table.dense == pytest.approx(0.6, abs=0.03)


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
def test_the_command_compares_on_the_digits(compare, forked, tmp_path, capsys) -> None:
    flags = (
        f"--checkpoint {DIGITS / 'model'} --data-dir {DIGITS / 'images'} --keep 50 --calibration-images 64"
    )
    flags += f" --merge {tmp_path / 'table.json'} --keep-models {tmp_path / 'models'}"
    forked(compare)
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


def test_the_setup_is_recorded_without_paths(tmp_path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"x")
    from setups import setup_of

    setup = make_setup(tmp_path / "m.safetensors", data_dir=str(tmp_path / "images"))
    assert str(tmp_path) not in json.dumps(setup.told())
    assert setup_of({"setup": json.loads(json.dumps(asdict(setup)))}) == setup


def test_an_ablation_that_cannot_begin_says_why_and_ends(tmp_path, capsys) -> None:
    ablation = script("ablation")
    flags = ["--merge", str(tmp_path / "rows"), "--checkpoint", "x", "--data-dir", "y"]
    assert ablation.main([*flags, "--methods", "nosuch"]) == 2
    assert "nosuch" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        ablation.main(["--help"])
    assert "ablation-full-no-repair" in capsys.readouterr().out


def test_mhacut_knows_the_flags_of_its_rows(methods) -> None:
    import typer

    from mhacut.cli.app import app

    prune = typer.main.get_command(app).commands["prune"]
    known = {flag for option in prune.params for flag in (*option.opts, *option.secondary_opts)}
    rows = [method for method in methods.METHODS.values() if not method.module]
    assert {flag for row in rows for flag in row.options["flags"] if flag.startswith("--")} <= known


def test_what_calibrates_alike_does_it_once(methods, tmp_path, monkeypatch) -> None:
    from methods import shared_calibration

    from mhacut.surgery.find import find_prunable_layers

    calls = []
    calibrate = shared_calibration._calibrate

    def counting(*args: Any, **about: Any) -> Any:
        calls.append(about)
        return calibrate(*args, **about)

    monkeypatch.setattr(shared_calibration, "_calibrate", counting)
    dense = small_vit()
    prunable, images = find_prunable_layers(dense), task_of(dense, 0.5).images
    about = {"batch_size": 8, "fisher": None}
    first = shared_calibration.SharedCalibration(tmp_path)
    mine = first(dense, prunable, images, **about)
    again = shared_calibration.SharedCalibration(tmp_path)
    found = again(dense, prunable, images, **about)
    assert (len(calls), first.saved_s) == (1, 0.0)
    assert again.saved_s > 0
    for key, moments in mine.moments.items():
        torch.testing.assert_close(found.moments[key].fit[0].second, moments.fit[0].second)
    for other in ({"batch_size": 4}, {}):
        changed = small_vit(qkv_bias=False) if not other else dense
        again(changed, find_prunable_layers(changed), images, **{**about, **other})
    assert len(calls) == 3


@pytest.mark.slow
def test_an_ablation_has_a_table_of_all_seeds(forked, tmp_path, capsys) -> None:
    ablation = script("ablation")
    forked(ablation.compare)
    paint(tmp_path / "images", classes=5, per_class=4, size=16)
    save_dense(small_vit(), tmp_path / "dense.safetensors")
    flags = f"--checkpoint {tmp_path / 'dense.safetensors'} --model vit_tiny_patch16_224"
    flags += "".join(f" --model-arg {name}={value}" for name, value in SMALL_VIT.items())
    flags += f" --data-dir {tmp_path / 'images'} --keep 75 --seeds 1 2"
    flags += f" --calibration-images 8 --merge {tmp_path / 'rows'} --half odd"
    flags += " --methods ablation-full-uniform"
    assert ablation.main(flags.split()) == 0
    table = capsys.readouterr().out
    assert "| 75 % | uniform widths |" in table
    for seed in (1, 2):
        rows = json.loads((tmp_path / f"rows-{seed}.json").read_text())["rows"]
        assert [row["method"] for row in rows] == ["dense", "ablation-full-uniform"]


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
