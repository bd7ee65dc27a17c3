"""``block_errors.py``: errors of the stream, block by block, beside a slow reference."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file

import mhacut
from helpers.benchmarks import SMALL_VIT, paint, script, small_vit


def test_errors_are_those_of_a_slow_reference():
    module, dense = script("block_errors"), small_vit().eval()
    slim, images = copy.deepcopy(dense), torch.randn(40, 3, 16, 16)
    with torch.no_grad():
        slim.blocks[1].mlp.fc2.weight.mul_(1.5)
    first, second = module.block_errors(dense, slim, images)
    assert first.relative == 0
    streams = []
    for model in (dense, slim):
        model.blocks[1].register_forward_hook(lambda block, args, output: streams.append(output.double()))
        with torch.inference_mode():
            model(images)
    rows, other = (stream.reshape(-1, stream.shape[-1]) for stream in streams)
    variance = rows.var(0, correction=0)
    error = (rows - other).square().mean(0)
    assert second.relative == pytest.approx(float(error.sum() / variance.sum()), rel=1e-5)
    assert second.scaled == pytest.approx(float((error / variance).mean()), rel=1e-5)
    assert second.largest_share == pytest.approx(float(variance.max() / variance.sum()), rel=1e-5)
    assert second.largest_ratio == pytest.approx(float(variance.max() / variance.median()), rel=1e-5)


def test_a_model_that_merges_is_refused():
    module, dense = script("block_errors"), small_vit().eval()
    slim = copy.deepcopy(dense)
    slim.blocks[1].register_forward_hook(lambda block, args, output: output[:, :-2])
    with pytest.raises(SystemExit, match=r"blocks\.1: expected 17 tokens, found 15: the model merges"):
        module.block_errors(dense, slim, torch.randn(2, 3, 16, 16))


@pytest.mark.slow
def test_a_pruned_file_has_a_row_per_block(tmp_path, capsys):
    module, file = script("block_errors"), tmp_path / "vit.safetensors"
    save_file(small_vit().state_dict(), file)
    data = paint(tmp_path / "images", classes=5, per_class=6, size=16)
    result = mhacut.prune(
        file,
        model="vit_tiny_patch16_224",
        model_args=SMALL_VIT,
        data_dir=data,
        flops="60%",
        effort="fast",
        latency=False,
        output=tmp_path / "slim.safetensors",
    )
    flags = ["--checkpoint", str(file), "--data-dir", str(data), "--model", "vit_tiny_patch16_224"]
    flags += [word for name, value in SMALL_VIT.items() for word in ("--model-arg", f"{name}={value}")]
    module.main([str(result.output), *flags, "--images", "10"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert rows[0][5:] == ["q/k", "v", "MLP"]
    widths = {key: str(width) for key, width in result.plan.widths().items()}
    units = (("attn", "qk"), ("attn", "v"), ("mlp", "hidden"))
    assert [row[5:] for row in rows[2:]] == [
        [widths[f"blocks.{number}.{layer}", kind] for layer, kind in units] for number in range(2)
    ]
    assert max(float(row[1]) for row in rows[2:]) > 0
