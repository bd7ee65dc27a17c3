"""``compare.py``, the methods that it compares, and ``ablation.py``."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from helpers.benchmarks import DIGITS, small_vit, task_of

pytestmark = pytest.mark.slow


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


def make_setup(checkpoint: Path, **other: Any) -> Any:
    from setups import Setup

    about = {"model": None, "model_args": (), "data_dir": "d", "mean": None, "std": None}
    return Setup(**{"checkpoint": str(checkpoint), **about, "calibration_images": 8, "seed": 1, **other})


def test_mhacut_is_run_as_a_user_would(compare, methods, tmp_path) -> None:
    setup = make_setup(Path("m.pth"), model="vit", model_args=("depth=6",), mean="0,0,0")
    method = methods.METHODS["mhacut-unlabelled-principal-fast"]
    command = " ".join(compare.mhacut_command(setup, method, 37.5, tmp_path / "o"))
    assert "prune m.pth --flops 37.5% " in command
    assert command.endswith(
        "--seed 1 --calibration-images 8 --model vit --model-arg depth=6 --mean 0,0,0 "
        "--scope attention+mlp --no-labels --set basis=principal --effort fast --calibration-images 128 "
        "--data-dir d"
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


def test_imagenet_is_compared_at_the_budgets_of_published_rows(
    compare, forked, few_digits, tmp_path, monkeypatch, capsys
) -> None:
    from published import Published, published

    assert {row.method for row in published("timm:deit_small_patch16_224.fb_in1k", None)} >= {
        "ToMe",
        "CORP, q/k",
    }
    rows = [
        Published("digits", "ToMe", 58.8, 79.35, 79.8, "a paper"),
    ]
    monkeypatch.setattr(compare, "published", lambda checkpoint, model: rows)
    monkeypatch.chdir(tmp_path)
    forked(compare)
    flags = f"--subject imagenet --root {few_digits} --checkpoint {DIGITS / 'model'} --calibration-images 16"
    asked = [*flags.split(), "--methods", "mhacut-plain-fast", "--markdown"]
    assert compare.main(asked) == 0
    document = json.loads((tmp_path / "imagenet_model.json").read_text())
    assert [row["keep"] for row in document["rows"]] == [None, 59, 50]
    assert [row["method"] for row in document["published"]] == ["ToMe"]
    assert "| ToMe | 58.8 % | 79.35 | -0.45 | a paper |" in capsys.readouterr().out
    monkeypatch.setattr(compare, "run", None)
    assert compare.main(asked) == 0  # with the rows that are there


def test_mhacut_knows_the_flags_of_its_rows(methods) -> None:
    import typer

    from mhacut.cli.app import app

    prune = typer.main.get_command(app).commands["prune"]
    known = {flag for option in prune.params for flag in (*option.opts, *option.secondary_opts)}
    rows = [method for method in methods.METHODS.values() if not method.module]
    assert {flag for row in rows for flag in row.options["flags"] if flag.startswith("--")} <= known
