"""Pictures of merged tokens: groups are what the model merged."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import torch

from helpers.models import ModelCase, build, image
from mhacut.data import Preprocessing
from mhacut.report.gallery import gallery, merged_groups, outlines
from mhacut.surgery.token_merging import SizedTokens
from mhacut.surgery.tokens import set_merged

CASE = ModelCase(
    "vit_tiny_patch16_224", {"depth": 4, "img_size": 32, "patch_size": 4, "num_classes": 7, "embed_dim": 48}
)
SAM = {"depth": 3, "embed_dim": 24, "num_heads": 2, "neck_chans": 8, "global_attn_indexes": (1,)}


def test_groups_are_as_large_as_the_tokens_say():
    model = build(CASE, dtype=torch.float64)
    set_merged(model, (20, 0, 13, 0))
    images, sizes = image(CASE, batch=3, dtype=torch.float64), []

    def keep(module, args, output):
        if isinstance(output, SizedTokens):
            sizes.append(output.sizes[:, 1:, 0])

    for block in model.blocks:
        block.register_forward_hook(keep)
    groups = merged_groups(model, images)
    assert list(groups) == ["blocks.0.matcher", "blocks.2.matcher"]
    for found, expected in zip(groups.values(), (sizes[0], sizes[2]), strict=True):
        assert found.shape == (3, 64)
        for one, tokens in zip(found, expected, strict=True):
            assert torch.equal(torch.bincount(one, minlength=len(tokens)), tokens.long())
    first, last = groups.values()
    for one, other in zip(first, last, strict=True):  # what became one stays one
        assert all(len(other[one == group].unique()) == 1 for group in one.unique())


def test_groups_of_grids_are_those_behind_each_block():
    case = ModelCase("samvit_base_patch16", {"img_size": 32, "patch_size": 4, "window_size": 4, **SAM})
    model, sizes = build(case), []
    set_merged(model, (28, 20, 0))
    for block in model.blocks[:2]:
        block.matcher.register_forward_hook(lambda module, args, output: sizes.append(output.sizes))
    groups = merged_groups(model, image(case, batch=2))
    assert list(groups) == ["blocks.0.matcher", "blocks.1.matcher"]
    for found, expected in zip(groups.values(), sizes, strict=True):
        for one, tokens in zip(found, expected.flatten(1), strict=True):
            assert torch.equal(torch.bincount(one), tokens.long())


def test_borders_lie_between_groups():
    groups = torch.randint(3, (5, 7), generator=torch.Generator().manual_seed(0))
    found = set(re.findall(r"M(\d+) (\d+)([vh])1", outlines(groups)))
    expected = {
        (f"{x}", f"{y}", "v") for y in range(5) for x in range(1, 7) if groups[y, x - 1] != groups[y, x]
    }
    expected |= {
        (f"{x}", f"{y}", "h") for y in range(1, 5) for x in range(7) if groups[y - 1, x] != groups[y, x]
    }
    assert found == expected


def test_an_image_is_shown_with_both_answers():
    dense = build(CASE)
    slim = build(CASE)
    set_merged(slim, (20, 0, 13, 0))
    preprocessing = Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
    images = image(CASE, batch=2)
    names = [f"<{letter}>" for letter in "abcdefg"]
    shown = gallery(dense, slim, images, preprocessing, names)
    assert len(shown) == 2
    for figure, before in zip(shown, dense(images).argmax(-1).tolist(), strict=True):
        drawn = ElementTree.fromstring(figure)
        assert names[before] in drawn.find("figcaption").text.partition("; pruned")[0]
        assert [text.text for text in drawn.iter("text")] == ["block 0: 44 tokens", "block 2: 31 tokens"]
        assert all(one.get("href").startswith("data:image/jpeg;base64,") for one in drawn.iter("image"))
