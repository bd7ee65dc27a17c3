"""The FLatten Transformers: what the official models give, through timm's interface."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

import mhacut
from helpers.flatten import SMALL
from helpers.flatten_official import (
    OFFICIAL,
    REFERENCED,
    digest,
    images,
    official_name,
    official_state,
)
from helpers.models import slow_but, slow_except
from mhacut.errors import UsageError
from mhacut.flatten import checkpoint_filter
from mhacut.flatten.attention import FocusedLinearAttention
from mhacut.surgery.flops import count_parameters, measure_flops

FAST = {"flatten_pvt_v2_b0", "flatten_swin_tiny_224"}
ONE_OF_A_FAMILY = FAST | {"flatten_cswin_tiny_224", "flatten_pvt_tiny"}
LARGEST = "flatten_swin_base_384"
RUN = ONE_OF_A_FAMILY | {LARGEST}
"""Those that are run at full size, one of them on images of another size; of the others, parameters count."""


def small(name: str, **args) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **{"img_size": 64, "num_classes": 5, **SMALL[name], **args})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) * (parameter.dim() != 2))
    return model.eval()


def filled(name: str) -> nn.Module:
    """The model with the weights of the recipe, brought to it as an official checkpoint would be; float64."""
    model = timm.create_model(name).eval().double()
    state = official_state(model)
    assert len(state) == OFFICIAL[name]["state_entries"]
    assert digest(state) == OFFICIAL[name]["digest"]
    model.load_state_dict(checkpoint_filter(model)(state, model), strict=True)
    return model


@pytest.mark.parametrize("name", slow_but(RUN - FAST, [name for name in REFERENCED if name in RUN]))
@torch.no_grad()
def test_logits_and_outputs_of_modules_are_those_of_the_official_model(name):
    """In float64, modules included where the official outputs are stored, and logits in float32."""
    facts, model, found = OFFICIAL[name], filled(name), {}
    count = 1 if name == LARGEST else len(facts["logits"])
    batch = images(facts["img_size"])[:count]
    probes = facts.get("probes", {})

    def note(key):
        def hook(module, args, output):
            if output.dtype == torch.float64:
                found[key] = [float(output.mean()), float(output.std())]

        return hook

    for module_name, module in model.named_modules():
        key = official_name(module_name)
        if name == "flatten_pvt_v2_b0" and key == "patch_embed":
            key = "patch_embed1"
        if key in probes:
            module.register_forward_hook(note(key))
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        logits = model.to(dtype)(batch.to(dtype)).double()
        torch.testing.assert_close(
            logits[:, :8], torch.tensor(facts["logits"][:count], dtype=torch.float64), rtol=0, atol=tolerance
        )
        # Of a thousand numbers, each of which may be off by the tolerance.
        for measured, expected in ((logits.sum(1), facts["sums"]), (logits.norm(dim=1), facts["norms"])):
            expected = torch.tensor(expected[:count], dtype=torch.float64)
            torch.testing.assert_close(measured, expected, rtol=0, atol=30 * tolerance)
    assert found.keys() == probes.keys()
    for key, expected in probes.items():
        assert found[key] == pytest.approx(expected, abs=1e-11), key


@pytest.mark.slow
def test_parameters_are_those_of_the_official_model():
    for name, facts in OFFICIAL.items():
        with torch.device("meta"):
            model = timm.create_model(name)
        assert count_parameters(model) == facts["parameters"], name
        assert model.patch_embed.img_size == (facts["img_size"],) * 2


@pytest.mark.parametrize(
    "name",
    ["flatten_pvt_v2_b0", *slow_but(RUN - ONE_OF_A_FAMILY, sorted(RUN - {"flatten_pvt_v2_b0"}))],
)
def test_flops_are_those_of_the_official_model(name):
    size = OFFICIAL[name]["img_size"]
    assert measure_flops(timm.create_model(name).eval(), (3, size, size)) == OFFICIAL[name]["flops"]


def test_deit_has_the_size_the_paper_reports():
    model = timm.create_model("flatten_deit_tiny").eval()
    assert count_parameters(model) == 6_190_888  # 6.1M there
    assert round(measure_flops(model, (3, 224, 224)) / 1e9, 1) == 1.1


@pytest.mark.parametrize("name", slow_except({"flatten_pvt_tiny"}, SMALL))
@torch.no_grad()
def test_the_interface_of_timm(name):
    model, batch = small(name), torch.randn(2, 3, 64, 64)
    logits = model(batch)
    assert logits.shape == (2, 5)
    features = model.forward_features(batch)
    assert features.is_contiguous()
    torch.testing.assert_close(model.forward_head(features), logits)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    final, taken = model.forward_intermediates(batch)
    torch.testing.assert_close(model.forward_head(final), logits)
    assert [tuple(t.shape[:2]) for t in taken] == [(2, info["num_chs"]) for info in model.feature_info]
    assert [64 // t.shape[-1] for t in taken] == [info["reduction"] for info in model.feature_info]
    early = model.forward_intermediates(batch, indices=[1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early, [taken[1]])
    assert model.get_classifier().out_features == 5
    model.reset_classifier(3)
    assert model(batch).shape == (2, model.num_classes) == (2, 3)
    model.reset_classifier(0)
    assert model(batch).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(batch).shape == features.shape


@pytest.mark.parametrize("name", SMALL)
def test_other_numbers_of_channels_and_classes(name):
    model = small(name, in_chans=1, num_classes=0, img_size=(64, 128))
    assert model(torch.randn(1, 1, 64, 128)).shape == (1, model.num_features)
    assert timm.models.get_model_input_config(model)["input_size"] == (1, 64, 128)


@pytest.mark.parametrize("name", SMALL)
def test_images_of_another_size_are_refused(name):
    with pytest.raises(AssertionError, match=r"Input height \(96\)|a map of 24x16 tokens, expected 16x16"):
        small(name)(torch.randn(1, 3, 96, 64))


@pytest.mark.parametrize("name", ["flatten_swin_tiny_224", "flatten_deit_tiny"])
@torch.no_grad()
def test_set_input_size_resizes_the_encodings(name):
    model = small(name)
    attn = next(module for module in model.modules() if isinstance(module, FocusedLinearAttention))
    side = attn.grid_size[0]
    # Windows that stay need no resizing; timm's own resizing of their biases warns (torch.searchsorted).
    model.set_input_size((128, 64), **({"window_size": 2} if "swin" in name else {}))
    assert attn.grid_size == (2 * side, side)
    assert attn.positional_encoding.shape[1] == 2 * side**2
    assert model(torch.randn(1, 3, 128, 64)).shape == (1, 5)
    there = small(name, img_size=(128, 64)).state_dict()
    assert {key: t.shape for key, t in model.state_dict().items()} == {
        key: t.shape for key, t in there.items()
    }


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        (
            "flatten_cswin_tiny_224",
            {"img_size": 256},
            "split_size 7: stripes of this width do not tile a map of 16x16",
        ),
        ("flatten_cswin_tiny_224", {"attn_type": "LLS"}, "attn_type 'LLS'"),
        ("flatten_swin_tiny_224", {"attn_type": "LMSS"}, "attn_type 'LMSS'"),
        ("flatten_swin_tiny_224", {"dynamic_img_size": True}, "img_size="),
        ("flatten_pvt_v2_b0", {"linear": True}, "linear"),
        ("flatten_deit_tiny", {"class_token": True}, "class_token"),
    ],
)
def test_arguments_that_make_no_sense(name, args, message):
    with pytest.raises(UsageError, match=message):
        timm.create_model(name, **args)


def test_preprocessing_is_that_of_the_authors():
    for name, facts in OFFICIAL.items():
        config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        assert config["input_size"] == (3, facts["img_size"], facts["img_size"])
        assert (config["crop_mode"], config["interpolation"]) == ("squash", "bicubic")
        assert config["crop_pct"] == (1.0 if name == "flatten_swin_base_384" else 0.875)


def test_timm_lists_them():
    assert set(timm.list_models("flatten_*")) == {*OFFICIAL, "flatten_deit_tiny"}
    assert len(timm.list_models(module="flatten_swin")) == 4
    assert not timm.list_models("flatten_*", pretrained=True)


FIRST = [
    "import mhacut, importlib.util; assert importlib.util.find_spec('timm'); import timm",
    "import timm, mhacut",
    "import mhacut; from timm.layers import Mlp; import timm",
    "import mhacut, importlib, timm; importlib.reload(timm); importlib.reload(mhacut)",
]
IN_TURN = """
import os, sys
import torch, torchvision.models.feature_extraction  # what timm imports; it takes the most time
for script in sys.argv[1:]:
    if os.fork() == 0:
        exec(script)
        assert timm.is_model("flatten_swin_tiny_224") and timm.is_model("vit_tiny_patch16_224")
        assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("mhacut")]
        assert "exec_module" not in vars(timm.__spec__.loader)
        break
    assert "timm" not in sys.modules
    assert os.wait()[1] == 0, script
"""


@pytest.mark.slow
def test_whatever_is_imported_first():
    subprocess.run([sys.executable, "-W", "error", "-c", IN_TURN, *FIRST], check=True)


def test_mhacut_alone_imports_neither_torch_nor_timm():
    script = "import sys, mhacut; assert not {'torch', 'timm', 'mhacut.flatten'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert mhacut.__version__
