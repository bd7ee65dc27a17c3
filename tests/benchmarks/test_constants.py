"""``constants.py``: other values of a constant, set and taken back."""

from __future__ import annotations

import pytest

from helpers.benchmarks import script
from mhacut.pruning import fisher
from mhacut.pruning import recover as heal

FLAGS = [
    "--checkpoint",
    "a",
    "--data-dir",
    "b",
    "--values",
    "0.25",
    "0.75",
    "--half",
    "odd",
    "--seeds",
    "1",
    "2",
]
NAMES = ("mhacut.pruning.fisher.SHRINKAGE", "mhacut.pruning.recover.SHRINKAGE")


def test_every_value_is_a_row_over_all_seeds_and_kept(tmp_path, capsys, monkeypatch):
    module, made = script("constants"), []

    def measure(asked, value, flops, seed):
        made.append((value, flops, seed))
        odd = {"top1": 50.0 + seed, "kl": float(value)}
        return {"top1": 0.0, "kl": 0.0, "halves": {"odd": odd}, "cpu_s": 7.0}

    monkeypatch.setattr(module, "measure", measure)
    flags = [*FLAGS, "--constant", *NAMES, "--merge", str(tmp_path / "rows.json")]
    module.main(flags)
    assert made == [("0.25", "50%", 1), ("0.75", "50%", 1), ("0.25", "50%", 2), ("0.75", "50%", 2)]
    printed = capsys.readouterr().out
    assert "| 0.75 | 50% | 51.5 ± 0.5 | 0.750 ± 0.000 | 7 ± 0 |" in printed
    module.main(flags)
    assert len(made) == 4  # what is in the file is not run again
    assert capsys.readouterr().out == printed


@pytest.mark.slow
def test_a_model_is_pruned_with_the_value_and_it_is_taken_back(few_digits, digits_vit, tmp_path, monkeypatch):
    module, seen, prune = script("constants"), [], script("constants").mhacut.prune

    def pruned(*given, **options):
        seen.append((fisher.SHRINKAGE, heal.SHRINKAGE))
        return prune(*given, **options, calibration_images=8)

    monkeypatch.setattr(module.mhacut, "prune", pruned)
    kept = tmp_path / "rows.json"
    flags = ["--checkpoint", str(digits_vit[1]), "--data-dir", str(few_digits), "--values", "0.25"]
    module.main([*flags, "--seeds", "0", "--effort", "fast", "--merge", str(kept), "--constant", *NAMES])
    assert seen == [(0.25, 0.25)]
    assert (fisher.SHRINKAGE, heal.SHRINKAGE) == (0.5, 0.5)
    (row,) = module.json.loads(kept.read_text()).values()
    assert row["kl"] > 0
    assert row["halves"].keys() == {"even", "odd"}
