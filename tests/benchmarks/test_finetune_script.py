"""``finetune.py`` and ``overhead.py``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.benchmarks import SMALL_VIT, paint, script, small_vit, task_of


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
    flags = f"--checkpoint {folder / 'dense.safetensors'} --model vit_tiny_patch16_224 --mean 0.5,0.5,0.5"
    flags += f" --std 0.5,0.5,0.5 --data-dir {folder / 'images'} --models {folder / 'models'} --keep 50"
    flags += f" --steps 6 3 --seeds 0 1 --batch 8 --lr 1e-2 --save-every 1 --runs {runs}"
    return [*flags.split(), *(f"--model-arg={name}={value}" for name, value in SMALL_VIT.items())]


def results_of(runs: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in runs.read_text().splitlines()[1:]]
    for line in found:
        del line["cpu_s"]
    return found


@pytest.mark.slow
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


@pytest.mark.exhaustive
def test_the_cost_of_pruning_is_told_per_stage(monkeypatch, tmp_path, capsys) -> None:
    overhead = script("overhead")
    file = tmp_path / "rows.json"
    flags = ["--models", "test_vit", "--depths", "2", "--images", "4", "--threads", "1"]
    flags += ["--merge", str(file)]
    overhead.main(flags)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("| test_vit, 2 blocks | balanced | 4 |")
    (row,) = json.loads(file.read_text()).values()
    assert set(overhead.STAGES) - set(row["seconds"]) == {"tuning", "swapping channels", "repairing in order"}
    # Not less: on Linux a child starts with the peak of its parent, which here is large.
    assert 0 < row["start"]["peak_mib"] <= row["all"]["peak_mib"]
    monkeypatch.setattr(overhead, "measure", None)  # what is in the file is not run again
    overhead.main(flags)
    assert capsys.readouterr().out.splitlines()[-1] == line
