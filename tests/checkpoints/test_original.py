"""Files of the repositories in which models were published; timm's own filters are the reference."""

from __future__ import annotations

import importlib
import re

import pytest
import timm
import torch

from helpers.checkpoints import refusal
from mhacut.checkpoint.load import read_model

VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}
EVA = {**VIT, "num_classes": 0}
SWIN = {
    "img_size": 32,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 2),
    "patch_size": 2,
}
PVT = {
    "embed_dims": (8, 16, 24, 32),
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 2, 2),
    "mlp_ratios": (2, 2, 2, 2),
}
XCIT = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2, "cls_attn_layers": 1, "patch_size": 8}
LEVIT = {"embed_dim": (16, 24, 32), "key_dim": 8, "num_heads": (2, 2, 2), "depth": (1, 1, 1)}
SAM = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "window_size": 2,
    "neck_chans": 8,
}


def renamed(state, *rules):
    found = {}
    for name, tensor in state.items():
        for pattern, to in rules:
            name = re.sub(pattern, to, name)
        found[name] = tensor
    return found


def dinov2(state):
    return {
        **renamed(state, (r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3")),
        "mask_token": torch.zeros(1, 48),
    }


def dinov2_in_chunks(state):
    return {**renamed(state, (r"^blocks\.(\d)", r"blocks.0.\1")), "mask_token": torch.zeros(1, 48)}


def dinov2_with_registers(state):
    state = renamed(state, ("^reg_token", "register_tokens"))
    positions = torch.cat([torch.full((1, 1, 48), 0.5), state["pos_embed"]], dim=1)
    return {
        **state,
        "cls_token": state["cls_token"] - 0.5,
        "pos_embed": positions,
        "mask_token": torch.zeros(1, 48),
    }


def without_mask(state):
    return {name: tensor for name, tensor in state.items() if name != "mask_token"}


def dinov3(state):
    state = renamed(state, (r"gamma_(\d)", r"ls\1.gamma"), ("^reg_token", "storage_tokens"))
    for name in [name for name in state if name.endswith("q_bias")]:
        q, v = state.pop(name), state.pop(name.replace("q_bias", "v_bias"))
        state[name.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.full_like(q, torch.nan), v])
        state[name.replace("q_bias", "qkv.bias_mask")] = torch.ones(144)
    return {**state, "mask_token": torch.zeros(1, 48), "rope_embed.periods": torch.ones(4)}


def mae(state):
    extra = {"mask_token": torch.zeros(1, 1, 8), "decoder_pred.bias": torch.zeros(4)}
    return {**state, **extra, "decoder_blocks.0.attn.qkv.weight": torch.zeros(24, 8)}


def ibot(state):
    return {**state, "masked_embed": torch.zeros(1, 48)}


def eva02(state):
    rules = (
        (r"mlp\.fc1_g", "mlp.w1"),
        (r"mlp\.fc1_x", "mlp.w2"),
        (r"mlp\.fc1\.", "mlp.w12."),
        (r"mlp\.fc2", "mlp.w3"),
        (r"mlp\.norm", "mlp.ffn_ln"),
        (r"attn\.([qv])_proj\.bias", r"attn.\1_bias"),
    )
    buffers = {"rope.freqs_cos": torch.ones(16, 16), "blocks.0.attn.rope.freqs_sin": torch.ones(16, 16)}
    return {**renamed(state, *rules), **buffers}


def beit(state):
    return {**state, "blocks.0.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.int64)}


def swin(state):
    index = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64)}
    masks = {"layers.0.blocks.1.attn_mask": torch.zeros(16, 16, 16)}
    return {**renamed(state, (r"layers\.1\.down", "layers.0.down"), (r"^head\.fc", "head")), **index, **masks}


def pvt(state):
    return renamed(
        state,
        ("^patch_embed", "patch_embed1"),
        (r"^stages\.(\d)\.downsample", lambda x: f"patch_embed{int(x[1]) + 1}"),
        (r"^stages\.(\d)\.blocks", lambda x: f"block{int(x[1]) + 1}"),
        (r"^stages\.(\d)\.norm", lambda x: f"norm{int(x[1]) + 1}"),
        (r"dwconv\.", "dwconv.dwconv."),
    )


def xcit(state):
    state = renamed(state, (r"^pos_embed\.", "pos_embeder."))
    for name in [name for name in state if re.search(r"cls_attn.*attn\.q\.", name)]:
        parts = [state.pop(re.sub(r"\.q\.", f".{part}.", name)) for part in "qkv"]
        state[re.sub(r"\.q\.", ".qkv.", name)] = torch.cat(parts)
    return state


def levit(state):
    return {**state, "stages.0.blocks.0.attn.attention_bias_idxs": torch.zeros(4, 4, dtype=torch.int64)}


def sam(state):
    state = renamed(state, ("^", "image_encoder."), (r"mlp\.fc", "mlp.lin"))
    return {**state, "mask_decoder.iou_token.weight": torch.zeros(1, 8)}


CASES = {
    "dinov2, in chunks": ("vit_small_patch14_dinov2", VIT, dinov2_in_chunks),
    "dinov2, gated": ("vit_giant_patch14_dinov2", VIT, dinov2),
    "dinov2, no mask": ("vit_giant_patch14_dinov2", VIT, lambda s: without_mask(dinov2(s))),
    "dinov2, registers": ("vit_small_patch14_reg4_dinov2", VIT, dinov2_with_registers),
    "dinov3": ("vit_small_patch16_dinov3_qkvb", EVA, dinov3),
    "mae": ("vit_base_patch16_224", {**VIT, "num_classes": 0}, mae),
    "ibot": ("vit_small_patch16_224", {**VIT, "num_classes": 0}, ibot),
    "eva02": ("eva02_base_patch14_224", EVA, eva02),
    "eva02, joined": ("eva02_small_patch14_224", EVA, eva02),
    "beit": ("beit_base_patch16_224", VIT, beit),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, swin),
    "swin v2": ("swinv2_tiny_window8_256", SWIN, swin),
    "pvt v2": ("pvt_v2_b0", PVT, pvt),
    "xcit": ("xcit_nano_12_p8_224", XCIT, xcit),
    "levit": ("levit_128s", LEVIT, levit),
    "sam": ("samvit_base_patch16", {**SAM, "num_classes": 0}, sam),
}


UNREAD_BY_TIMM = {name for name in CASES if "chunks" in name or "no mask" in name} | {"mae", "ibot"}


@pytest.mark.parametrize("case", CASES)
def test_names_of_the_authors_become_timms(case, tmp_path):
    name, args, to_original = CASES[case]
    torch.manual_seed(0)
    model = timm.create_model(name, **args)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    state = model.state_dict()
    original = to_original({key: tensor.clone() for key, tensor in state.items()})
    torch.save({"model": original}, tmp_path / "model.pth")
    reference = importlib.import_module(type(model).__module__)
    if case not in UNREAD_BY_TIMM:
        filtered = reference.checkpoint_filter_fn(dict(original), model)
        model.load_state_dict({key: filtered[key] for key in state})
        state = model.state_dict()
    found = read_model(tmp_path / "model.pth", model=name, model_args=args).model.state_dict()
    assert found.keys() == state.keys()
    for key in found:
        torch.testing.assert_close(found[key], state[key], rtol=0, atol=1e-6)


def test_a_tensor_that_no_table_knows_is_named(tmp_path):
    state = ibot(timm.create_model("vit_small_patch16_224", **VIT).state_dict())
    torch.save({**state, "blocks.0.extra.weight": torch.zeros(3)}, tmp_path / "a.pth")
    assert "blocks.0.extra.weight" in refusal(
        tmp_path / "a.pth", model="vit_small_patch16_224", model_args=VIT
    )


@pytest.mark.slow
def test_deit_3_of_its_authors_is_not_taken_for_a_rotary_vit(tmp_path):
    name = "deit3_small_patch16_224"
    model = timm.create_model(name, num_classes=10)
    torch.save(renamed(model.state_dict(), (r"ls(\d)\.gamma", r"gamma_\1")), tmp_path / "a.pth")
    message = refusal(tmp_path / "a.pth")
    assert "fit both vit_small_patch16_rope_ape_224 and DeiT III" in message
    found = read_model(tmp_path / "a.pth", model=name).model.state_dict()
    assert all(torch.equal(tensor, found[key]) for key, tensor in model.state_dict().items())
    rotary = read_model(tmp_path / "a.pth", model="vit_small_patch16_rope_ape_224")
    assert "blocks.0.gamma_1" in rotary.model.state_dict()


@pytest.mark.slow
def test_images_are_prepared_as_the_authors_did(tmp_path):
    torch.save(
        ibot(timm.create_model("vit_small_patch16_224", num_classes=0).state_dict()), tmp_path / "a.pth"
    )
    found = read_model(tmp_path / "a.pth")
    assert found.identity.pretrained_cfg["mean"] == [0.485, 0.456, 0.406]
    assert found.cfg_origins["mean"] == "library"
