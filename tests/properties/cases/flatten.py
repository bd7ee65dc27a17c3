"""Attention of the FLatten Transformers."""

from __future__ import annotations

from torch import nn

from helpers.flatten import FLATTEN
from helpers.models import ModelCase
from mhacut.flatten.attention import FusedFocusedAttention, SeparateFocusedAttention
from mhacut.flatten.flatten_cswin import CswinAttention

CASES: dict[type[nn.Module], dict[str, ModelCase]] = {
    SeparateFocusedAttention: {"pvt": FLATTEN["flatten_pvt_tiny"], "pvt v2": FLATTEN["flatten_pvt_v2_b0"]},
    FusedFocusedAttention: {"": FLATTEN["flatten_swin_tiny_224"], "deit": FLATTEN["flatten_deit_tiny"]},
    CswinAttention: {"": FLATTEN["flatten_cswin_tiny_224"]},
}
