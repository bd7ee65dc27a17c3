"""Parts of the values that a pickle makes are counted as often as they occur, without making them."""

from __future__ import annotations

import io
import pickle
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mhacut.checkpoint import pickle_bounds
from mhacut.checkpoint.pickle_bounds import _Follower, check_pickles
from mhacut.errors import CheckpointError

atoms = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
keys = st.text(max_size=3) | st.integers(-3, 3) | st.tuples(st.integers(), st.integers())
values = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.lists(inner, max_size=3).map(lambda items: items * 2)  # the same ones again
        | st.dictionaries(keys, inner, max_size=3)
    ),
)


def parts(value: object) -> int:
    """Number of values in ``value``, itself included."""
    if isinstance(value, dict):
        return 1 + sum(parts(key) + parts(item) for key, item in value.items())
    return 1 + sum(map(parts, value)) if isinstance(value, list | tuple) else 1


@given(value=values)
def test_parts_are_counted_as_often_as_they_occur(value):
    data = pickle.dumps(value, protocol=2)
    follower = _Follower("file", data)
    assert follower.end(0) == len(data)
    assert [each.parts for each in follower.stack] == [parts(value)]
    assert not follower.marks
    check_pickles("file", data)


def saved(value: object, **options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def test_what_training_scripts_save_has_few_parts():
    state = OrderedDict((f"blocks.{number}.weight", torch.ones(1)) for number in range(100))
    state._metadata = {"": {"version": 1}}
    betas = (0.9, 0.999)
    groups = [{"params": list(range(100)), "betas": betas, "options": [betas] * 10}] * 5
    whole = {"model": state, "model_ema": state, "optimizer": groups, "args": Namespace(betas=betas)}
    data = saved(whole, _use_new_zipfile_serialization=False)
    check_pickles("file", data, 5)
    follower, at = _Follower("file", data), 0
    for _ in range(4):  # magic number, version, system, and the values
        follower = _Follower("file", data)
        at = follower.end(at)
    assert 0 < follower.parts < 100 * 50


@pytest.mark.parametrize(
    "value",
    [
        torch.nn.Linear(2, 2).state_dict(),
        torch.nn.Parameter(torch.ones(2)),
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, device="meta"),
        torch.ones(2).as_subclass(torch.nn.Buffer),
        torch.ones(2, dtype=torch.complex64).conj(),
        {"b": b"bytes", "c": 1j, "s": {1, 2}, "n": Counter("abca"), "f": torch.Size([1])},
        {"d": defaultdict(list, a=[1]), "e": defaultdict(set), "o": OrderedDict(a=torch.ones(1))},
        {"t": torch.float32, "g": torch.get_rng_state(), "v": torch.device("cpu"), "p": Path("a")},
        {"x": np.float64(1.5), "y": Namespace(a=1, b=[Namespace()])},
        torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict(),
    ],
)
def test_what_torch_saves_is_not_refused(value):
    check_pickles("file", saved(value, _use_new_zipfile_serialization=False), 5)


@pytest.mark.parametrize("count", [3, 4])
def test_parts_beyond_the_bound_are_refused_whatever_names_them(monkeypatch, count):
    pair = (1, 2)  # named again: three parts each time
    data = pickle.dumps([pair] * (1 + count), protocol=2)
    monkeypatch.setattr(pickle_bounds, "_MAX_PARTS", 9)
    if count == 3:
        check_pickles("file", data)
        return
    says = r"^file: its pickle may take too much .* names again have more than 9 parts; save the state dict"
    with pytest.raises(CheckpointError, match=says):
        check_pickles("file", data)
    with pytest.raises(CheckpointError, match=says):
        check_pickles("file", pickle.dumps(1, protocol=2) + data, 2)
    check_pickles("file", pickle.dumps(1, protocol=2) + data, 1)


NESTED = b"NN\x86q\x00" + b"h\x00\x86q\x00" * 40
"""A pair of None, and 40 times a pair of the one before twice."""


SET = b"cbuiltins\nset\n"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(NQtR"
"""A function of torch with what is stored under the key None."""
TAKEN = "it gives a tensor to what takes a list"


def copied(times: int, values: int) -> bytes:
    """A set of a set of a set, and so on, and in the end a list of values."""
    return b"cbuiltins\nset\n" * times + b"](" + b"N" * values + b"e" + b"\x85R" * times + b"."


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"]q\x01h\x01\x86h\x01Na.", "a value is filled after it was named again"),
        (b"}q\x01h\x01\x86h\x01NNs.", "a value is filled after it was named again"),
        (b"]q\x01h\x01\x86h\x01(NNe.", "a value is filled after it was named again"),
        (b"]q\x01(h\x01h\x01t.", None),
        (b"Nr\x05\x00\x00\x00.", None),
        (b"Nr\xff\x00\x00\x00.", "it numbers a value 255, expected fewer than its 9 bytes"),
        (b"cbuiltins\nbytearray\nK\x01\x85R.", "it makes bytearrays"),
        (b"c__builtin__\nbytearray\nK\x01\x85\x81.", "it makes bytearrays"),
        (b"cUserDict\nIterableUserDict\ncx\nbytearray\n.", None),
        (b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n.", "move them to the CPU first"),
        (b"cbuiltins\nset\nK\x01\x85R.", None),
        (SET + b"(" + TENSOR + b"tR.", TAKEN),
        (SET + b"((" + TENSOR + b"ttR.", TAKEN),
        (SET + b"(" + TENSOR + b"t\x81.", TAKEN),
        (b"cUserList\nCounter\n(" + TENSOR + b"tR.", TAKEN),
        (b"ccollections\nOrderedDict\n(((Na" + TENSOR + b"tttR.", None),
        (b"ccollections\nOrderedDict\n((" + TENSOR + b"ttR.", TAKEN),
        (SET + TENSOR + b"R.", TAKEN),
        (b"ca\nb\n" + TENSOR + b"R.", TAKEN),
        (b"ca\nb\n(" + TENSOR + b"tR.", None),
        (TENSOR + TENSOR + b"b.", TAKEN),
        (TENSOR + TENSOR + b"\x85b.", None),
        (b"ctorch._tensor\n_rebuild_from_type_v2\n(" + SET + SET + b"(" + TENSOR + b"ttR.", TAKEN),
        (b"ctorch._tensor\n_rebuild_from_type_v2\n(ca\nb\nca\nb\n(" + TENSOR + b"tNtR.", None),
        (b"ccollections\ndefaultdict\n" + SET + b"\x85R.", None),
        (copied(20, 20), None),
        (copied(400, 50_000), "names again have more than 16777216 parts"),
        (copied(6000, 1), "it nests more than 1000 values in each other"),
        (b"}N" + b"\x85" * 1001 + b"Ns.", "it nests more than 1000 values in each other"),
        (b"}N" + b"\x85" * 999 + b"Ns.", None),
        (b"}" + NESTED + b"Ns.", "names again have more than 16777216 parts"),
        (b"cbuiltins\nset\n](" + NESTED + b"e\x85R.", "names again have more than 16777216 parts"),
    ],
)
def test_what_no_checkpoint_needs_is_refused(data, says):
    if says is None:
        check_pickles("file", b"\x80\x02" + data)
    else:
        with pytest.raises(CheckpointError, match=says):
            check_pickles("file", b"\x80\x02" + data)


@given(
    data=st.binary(max_size=40)
    | st.lists(st.sampled_from(b"()]}N\x85\x86\x87tasue0q\x00h\x01Rb.")).map(bytes)
)
def test_broken_pickles_are_left_to_what_loads_them(data):
    with suppress(CheckpointError):
        check_pickles("file", b"\x80\x02" + data, 5)
