"""``mhacut models``: what of timm can be cut, as it is found by looking."""

from __future__ import annotations

from helpers.cli import document_of, run, succeed
from mhacut.commands.models import catalogue


def test_what_can_be_cut_and_what_is_refused():
    (vit,) = catalogue("vit_tiny_patch16_224")
    assert (vit.attention, vit.kinds, vit.refusal) == (("Attention",), ("qk", "v", "hidden"), None)
    assert "augreg_in21k_ft_in1k" in vit.tags
    assert vit.tokens_stay == catalogue("vit_small_patch16_dinov3")[0].tokens_stay == ""
    (mvit,) = catalogue("mvitv2_tiny")
    assert "plain ViT" in mvit.tokens_stay
    assert mvit.kinds == ("hidden",)
    assert any("attn" in line for line in mvit.not_prunable)
    (refused,) = catalogue("bat_resnext26ts")
    assert refused.transformer
    assert refused.kinds == ()
    assert "BilinearAttnTransform" in refused.refusal
    (resnet,) = catalogue("resnet18")
    assert not resnet.transformer
    assert "no attention" in resnet.refusal
    (pooled,) = catalogue("resnet50_clip")  # attends only behind its body
    assert not pooled.transformer
    assert "no attention" in pooled.refusal
    (flatten,) = catalogue("flatten_deit_tiny")
    assert flatten.kinds == ("qk", "v", "hidden")
    assert catalogue("mhacut_slim") == ()
    (coat,) = catalogue("coat_lite_mini")
    assert coat.kinds == ("qk", "v", "hidden")  # the first goes with the second


def test_the_command():
    result = succeed("models", "bat_resnext26*")
    assert "bat_resnext26ts" in result.stdout
    assert result.stdout.splitlines()[-2:] == [
        "0 of 1 architectures with attention can be pruned (0 of 1 pretrained tags); "
        "attention channels in 0; tokens merge in 0; 0 have no attention",
        "-: refused; --refused shows the reasons",
    ]
    why = run("models", "bat_resnext26*", "--refused").stdout
    assert "BilinearAttnTransform" in why
    assert "`mhacut models`" not in why
    assert run("models", "resnet18").stdout == "1 architecture(s) without attention\n"
    document = document_of("models", "resnet18")
    assert document["schema_version"] == 1
    (entry,) = document["models"]
    assert entry["architecture"] == "resnet18"
    assert entry["transformer"] is False
    nothing = run("models", "nothing_like_it")
    assert nothing.exit_code == 2
    assert "'nothing_like_it': no matching model in timm; try '*nothing_like_it*'" in nothing.stderr
    assert "try" not in run("models", "*nothing_like_it*").stderr
