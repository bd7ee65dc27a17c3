"""A saved state from anyone: the run goes on as if never cut off, or is refused with what to do."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from timm.optim import list_optimizers

from helpers.cli import refusal
from helpers.finetuning import Killed, go_on, same, small_state, small_trainer, take_steps
from mhacut.errors import CheckpointError, DataError, UsageError
from mhacut.finetuning.folder import RunFolder
from mhacut.finetuning.saving import _MOST_LISTED, _write_last
from mhacut.finetuning.training import Trainer


@pytest.fixture(scope="module")
def after_four():
    """A trainer after four steps; only read."""
    trainer = small_trainer(model_ema=True)
    take_steps(trainer, 0, 4)
    return trainer


@pytest.fixture
def state(after_four):
    """What its run saves."""
    return copy.deepcopy(small_state(after_four))


FEW = ("sgd", "adamw", "adafactor", "radam", "madgrad", "muon")


@pytest.mark.filterwarnings("ignore:It is highly recommended:UserWarning")
@pytest.mark.parametrize("names", [FEW, pytest.param(list_optimizers(), marks=pytest.mark.slow)])
def test_every_optimiser_goes_on_as_if_never_cut_off(tmp_path, names):
    """None keeps a state that is taken for another run's."""
    tried = 0
    for name in names:
        try:
            whole, again = small_trainer(opt=name), small_trainer(opt=name)
        except UsageError:  # needs a package, or second derivatives
            continue
        tried += 1
        take_steps(whole, 0, 4)
        RunFolder(tmp_path).write_state(small_state(whole))
        take_steps(whole, 4, 6)
        assert go_on(tmp_path, again, 6).step == 4
        assert same(whole.model.state_dict(), again.model.state_dict()), name
    assert tried == len(FEW) or tried > 50


def drop(*keys):
    def change(state):
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return change


def put(value, *keys):
    def change(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


NAN, OPTIMIZER = float("nan"), ("trainer", "optimizer")
WRONG = {
    "no inputs": (drop("began_with"), "began_with: expected a dict, found nothing"),
    "an input": (put([1], "began_with", "plan"), "began_with: 'plan': expected text or a number, found list"),
    "no step": (drop("step"), "step: expected a whole number of 0 to 8, found None"),
    "a step of another run": (put(9, "step"), "step: expected a whole number of 0 to 8, found 9"),
    "half a step": (put(4.5, "step"), "step: expected a whole number of 0 to 8, found 4.5"),
    "a true step": (put(True, "step"), "step: expected a whole number of 0 to 8, found True"),
    "no evaluation": (drop("before"), "before: expected an evaluation or None, found nothing"),
    "no best": (put(NAN, "best"), "best: expected a number of 0 to 100, found nan"),
    "a loss": (put(float("inf"), "epoch_loss"), "epoch_loss: expected a number of"),
    "a loss without end": (put(10**400, "rows", 0, "train_loss"), "rows: train_loss: expected a number"),
    "images": (put("3", "epoch_images"), "epoch_images: expected a whole number, found '3'"),
    "no row": (put([], "rows"), "rows: expected 1 after step 4, found 0"),
    "rows": (put(1, "rows"), "rows: expected a list, found int"),
    "a row": (put([4], "rows"), "rows: expected a dict, found int"),
    "a column too many": (put(1, "rows", 0, "x"), "rows: expected epoch, train_loss, eval_loss"),
    "a column too few": (drop("rows", 0, "lr"), "rows: lr: expected a number, found None"),
    "a column": (put(NAN, "rows", 0, "eval_loss"), "rows: eval_loss: expected a number, found nan"),
    "before": (put({"top1": 1}, "before"), "before: top5: expected a number, found None"),
    "unreadable": (put([1], "unreadable"), "unreadable: expected names of images"),
    "no trainer": (drop("trainer"), "trainer: expected a dict, found nothing"),
    "no model": (drop("trainer", "model"), "model: expected a dict, found nothing"),
    "no weight": (drop("trainer", "model", "3.bias"), "model: '3.bias' is missing"),
    "another weight": (put(torch.ones(1), "trainer", "model", "x"), "model: 'x' is no tensor of the model"),
    "no tensor": (put("x", "trainer", "model", "3.bias"), "expected float32 (3,), found str"),
    "a shape": (put(torch.ones(4), "trainer", "model", "3.bias"), "float32 (3,), found float32 (4,)"),
    "a dtype": (put(torch.ones(3).half(), "trainer", "model", "3.bias"), "found float16 (3,)"),
    "a weight": (put(torch.full((3,), NAN), "trainer", "model", "3.bias"), "3.bias: 3 of 3 values are NaN"),
    "no memory": (put(torch.ones(3, device="meta"), "trainer", "model", "3.bias"), "expected a dense tensor"),
    "no average": (put(None, "trainer", "average"), "average: expected a dict, found nothing"),
    "no scaler": (put(1, "trainer", "scaler"), "scaler: expected a dict, found int"),
    "no optimiser": (drop(*OPTIMIZER), "optimizer: expected a dict, found nothing"),
    "no groups": (drop(*OPTIMIZER, "param_groups"), "param_groups: expected a list, found nothing"),
    "a group": (put([1], *OPTIMIZER, "param_groups"), "param_groups: expected 2, found 1"),
    "no parameters": (drop(*OPTIMIZER, "param_groups", 0, "params"), "param_groups: params: expected"),
    "parameters": (put([0], *OPTIMIZER, "param_groups", 0, "params"), "param_groups: params: expected"),
    "an option": (put("x", *OPTIMIZER, "param_groups", 1, "eps"), "param_groups: eps: expected"),
    "betas": (put((0.9, NAN), *OPTIMIZER, "param_groups", 1, "betas"), "param_groups: betas: expected"),
    "moments": (put(torch.full((3,), NAN), *OPTIMIZER, "state", 0, "exp_avg"), "3 of 3 values are NaN"),
    "a number": (put(NAN, *OPTIMIZER, "state", 0, "step"), "optimizer: expected a number, found nan"),
    # What only the optimiser knows, its first step shows.
    "no moments": (drop(*OPTIMIZER, "state", 0, "exp_avg"), "optimizer: KeyError: 'exp_avg'"),
    "of moments": (put(torch.ones(7), *OPTIMIZER, "state", 0, "exp_avg"), "optimizer: RuntimeError: "),
    "no tensor of moments": (put("x", *OPTIMIZER, "state", 0, "exp_avg"), "optimizer: "),
}  # fmt: skip


def test_a_sparse_tensor_is_refused(state, tmp_path):
    put(torch.ones(3).to_sparse(), "trainer", "model", "3.bias")(state)
    RunFolder(tmp_path).write_state(state)
    with pytest.raises(CheckpointError, match=r"state\.pt: .*(expected a dense tensor|cannot be read)"):
        go_on(tmp_path, small_trainer(model_ema=True))  # torch 2.7 cannot even read it


@pytest.mark.parametrize("case", WRONG)
def test_a_state_of_another_kind_is_refused(state, tmp_path, case):
    change, says = WRONG[case]
    change(state)
    RunFolder(tmp_path).write_state(state)
    before = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(CheckpointError, match=re.escape(says)) as error:
        go_on(tmp_path, small_trainer(model_ema=True))
    assert str(error.value).startswith(f"{tmp_path / 'state.pt'}: is not the state of this run (")
    assert "last.safetensors holds its weights, and overwrite=True instead of resume starts again" in str(
        error.value
    )
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    assert (tmp_path / "state.pt").read_bytes() == before


def test_a_scaler_of_another_kind_is_refused(state, tmp_path):
    """It is used on GPUs only."""
    trainer = small_trainer(model_ema=True)
    trainer.scaler = torch.amp.GradScaler("cpu", enabled=True)
    own = trainer.scaler.state_dict()
    for wrong in ({}, {**own, "scale": NAN}, {**own, "growth_interval": "x"}):
        state["trainer"]["scaler"] = wrong
        RunFolder(tmp_path).write_state(state)
        with pytest.raises(CheckpointError, match="scaler: expected numbers scale, growth_factor"):
            go_on(tmp_path, trainer)
    state["trainer"]["scaler"] = own
    RunFolder(tmp_path).write_state(state)
    assert go_on(tmp_path, trainer, 4).step == 4


def test_options_that_an_older_torch_did_not_save_have_their_defaults(state, tmp_path):
    for group in state["trainer"]["optimizer"]["param_groups"]:
        del group["maximize"]
    RunFolder(tmp_path).write_state(state)
    assert go_on(tmp_path, small_trainer(model_ema=True)).step == 4


def test_without_validation_images_there_is_no_best(state, tmp_path):
    from mhacut.finetuning.saved_state import read_saved

    inputs = {**state["began_with"], "validation images": None}
    RunFolder(tmp_path).write_state({**state, "began_with": inputs})
    with pytest.raises(CheckpointError, match="best: expected none without validation images"):
        read_saved(RunFolder(tmp_path), small_trainer(), inputs, (8, 4))


def test_an_optimiser_that_fails_in_a_run_of_its_own_is_not_blamed_on_a_state(monkeypatch):
    trainer = small_trainer()

    def fail(*args, **options):
        raise KeyError("bug")

    monkeypatch.setattr(trainer.optimizer, "step", fail)
    with pytest.raises(KeyError, match="bug"):
        take_steps(trainer, 0, 1)


def test_nor_in_later_steps(state, tmp_path, monkeypatch):
    trainer = small_trainer(model_ema=True)
    RunFolder(tmp_path).write_state(state)
    go_on(tmp_path, trainer)
    trainer.optimizer.state.clear()
    monkeypatch.setattr(trainer.optimizer, "param_groups", [{}])
    with pytest.raises(KeyError):
        take_steps(trainer, 5, 6)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "is not the state of a run, which states its version"),
        ([1], "is not the state of a run, which states its version"),
        ({"version": torch.ones(2)}, "is not the state of a run, which states its version"),
        ({"version": 1}, "is not the state of this run (began_with: expected a dict, found nothing)"),
    ],
)
def test_files_that_hold_no_state(tmp_path, content, says):
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=re.escape(says)):
        go_on(tmp_path, small_trainer())


def test_states_of_another_version_are_named(state, tmp_path):
    torch.save({**state, "version": 2}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="this mhacut can resume from version 1, found 2"):
        go_on(tmp_path, small_trainer())


def wrong_shape(content):
    content["trainer"]["model"]["cls_token"] = torch.zeros(2)


def not_a_number(content):
    content["trainer"]["model"]["cls_token"] += NAN


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict.clear, "is not the state of a run"),
        (drop("began_with"), "began_with: expected a dict, found nothing"),
        (wrong_shape, "model: cls_token: expected float32 (1, 1, 48), found float32 (2,)"),
        (not_a_number, "model: cls_token: 48 of 48 values are NaN"),
    ],
)
def test_the_command_refuses_it_in_a_line(finished, tmp_path_factory, monkeypatch, change, says):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    content = torch.load(finished / "state.pt")
    change(content)
    torch.save(content, finished / "state.pt")
    (finished / "best.safetensors").unlink()  # which would be written anew
    message = refusal(finished, "finetune", "--resume", finished)
    line = message.splitlines()[-1]
    assert line.startswith(f"error: {finished / 'state.pt'}: ")
    assert says in line
    assert "--overwrite instead of --resume starts again" in line


def test_the_command_refuses_what_the_optimiser_cannot_work_with(tune, tmp_path, kill, monkeypatch):
    kill(Trainer, "step", 5)
    with pytest.raises(Killed):
        tune()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    content = torch.load("run/state.pt")
    del content["trainer"]["optimizer"]["state"][0]["exp_avg"]
    torch.save(content, "run/state.pt")
    line = refusal(tmp_path, "finetune", "--resume", "run").splitlines()[-1]
    assert line.startswith(
        "error: run/state.pt: is not the state of this run (optimizer: KeyError: 'exp_avg')"
    )


def test_the_names_of_as_many_unreadable_images_as_a_run_may_have_can_be_read_again(state, tmp_path):
    """Their list is the only part of a state that grows with the data."""
    names = [
        f"/data/imagenet22k/train/n{number:08}/n{number:08}_{number:07}.JPEG"
        for number in range(_MOST_LISTED)
    ]
    RunFolder(tmp_path).write_state({**state, "unreadable": names})
    assert list(go_on(tmp_path, small_trainer(model_ema=True), 4).unreadable) == names


def test_a_run_with_more_unreadable_images_ends(monkeypatch):
    unreadable, images = {"a.png": None, "b.png": None}, SimpleNamespace(count=100)
    run = SimpleNamespace(progress=SimpleNamespace(unreadable=unreadable), images=images)
    monkeypatch.setattr("mhacut.finetuning.saving._MOST_LISTED", 1)
    with pytest.raises(
        DataError, match=r"2 of 100 images cannot be read, first a\.png; repair or remove them"
    ):
        _write_last(run, None)


def test_an_optimiser_that_needs_a_gpu_is_refused(monkeypatch):
    def without_cuda(*args, **options):
        raise AssertionError("CUDA required for bitsandbytes optimizers")  # as timm does

    monkeypatch.setattr("mhacut.finetuning.training.create_optimizer_v2", without_cuda)
    with pytest.raises(UsageError, match="opt='bnbsgd': cannot be created: CUDA required"):
        small_trainer(opt="bnbsgd")
