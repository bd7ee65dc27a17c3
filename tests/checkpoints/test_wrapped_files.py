"""Files as training scripts leave them open as the plain state dict in them would, and say what was done."""

from __future__ import annotations

import argparse

import pytest
import timm
import torch
from safetensors.torch import save_file

from helpers.checkpoints import ARGS, IMAGES, NAME, logits_with, make_slim, refusal, save, tiny, under
from mhacut.checkpoint.build import without_values
from mhacut.checkpoint.load import load_model, read_model
from mhacut.checkpoint.wrapping import unwrap

HEAD = {"mlp.0.weight": torch.ones(3, 2), "last_layer.weight_g": torch.ones(3, 1)}


def logits_of(path, **args):
    loaded = read_model(path, **{"model": NAME, "model_args": ARGS, **args})
    with torch.no_grad():
        return loaded.model(IMAGES), loaded.notes


def dino(w, other):
    return {
        "student": {**under("module.backbone.", other), **under("module.head.", HEAD)},
        "teacher": {**under("backbone.", w), **under("head.", HEAD)},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
        "dino_loss": {"center": torch.ones(1, 4)},
        "args": argparse.Namespace(arch="vit_small", patch_size=16),
        "epoch": 3,
    }


def lightning(w, other, **beside):
    loss = {"criterion.weight": torch.ones(10), "loss_fn.scale": torch.ones(1)}
    return {
        "state_dict": {**under("model.", w), **loss},
        "pytorch-lightning_version": "2.5.0",
        "epoch": 3,
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
        "hyper_parameters": {"lr": 1e-3},
        **beside,
    }


IN_TORCH_FILES = {
    "lightning": (lightning, "part 'state_dict' of the checkpoint; removed the prefix model. from"),
    "left out": (lightning, "left out criterion, loss_fn"),
    "timm": (lambda w, o: {"state_dict": o, "state_dict_ema": w}, "part='state_dict' reads another part"),
    "ema": (lambda w, o: {"model": o, "ema": {"decay": 0.999, "shadow": w}}, "read the part 'ema.shadow'"),
    "tutorial": (
        lambda w, o: {"epoch": 1, "model_state_dict": w, "optimizer_state_dict": {}, "loss": torch.ones(())},
        "read the part 'model_state_dict'",
    ),
    "any name": (lambda w, o: {"my_weights": w, "my_epoch": 4}, "read the part 'my_weights'"),
    "nested": (lambda w, o: {"model": {"state_dict": under("net.", w)}}, "read the part 'model.state_dict'"),
    "i-jepa": (
        lambda w, o: {
            "encoder": under("module.", w),
            "predictor": {"module.blocks.0.x": torch.ones(9), "module.blocks.1.x": torch.ones(9)},
            "target_encoder": under("module.", o),
        },
        "read the part 'encoder' of the checkpoint; removed the prefix module. from the tensor names; "
        "part='target_encoder' reads another part",
    ),
}
IN_ANY_FILE = {
    "module": (lambda w, o: under("module.", w), "removed the prefix module. from the tensor names"),
    "compiled": (lambda w, o: under("_orig_mod.module.", w), "removed the prefix _orig_mod.module. from"),
    "compiled blocks": (
        lambda w, o: {name.replace("blocks.0.", "blocks.0._orig_mod."): t for name, t in w.items()},
        "removed the prefix _orig_mod. from",
    ),
    "model.module": (lambda w, o: under("model.module.", w), "removed the prefix model.module. from"),
    "own word": (lambda w, o: under("my_vit.", w), "removed the prefix my_vit. from"),
    "loss beside": (lambda w, o: {**w, "criterion.weight": torch.ones(10)}, "left out criterion"),
    "averaged": (
        lambda w, o: {**under("model.", o), **under("ema_model.module.", w)}
        | {"ema_model.n_averaged": torch.tensor(3)},
        "left out model, n_averaged; part='model' reads another part",
    ),
    "solo-learn": (
        lambda w, o: {**under("backbone.", w), **under("momentum_backbone.", o)}
        | {"projector.0.weight": torch.ones(3, 2), "momentum_projector.0.weight": torch.ones(3, 2)},
        "left out momentum_backbone, momentum_projector, projector; part='momentum_backbone'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        *((layout, "torch") for layout in (*IN_ANY_FILE, *IN_TORCH_FILES)),
        *((layout, "safetensors") for layout in IN_ANY_FILE),
    ],
)
def test_each_layout_opens_as_the_plain_file(tmp_path, states, layout, kind):
    make, line = {**IN_TORCH_FILES, **IN_ANY_FILE}[layout]
    path = tmp_path / f"model.{kind}"
    content = make(*states)
    if kind == "torch":
        torch.save(content, path)
    else:
        save_file({name: tensor.clone() for name, tensor in content.items()}, path)
    found, notes = logits_of(path)
    assert torch.equal(found, logits_with(states[0]))
    assert [note for note in notes if line in note], notes


def dinov2(w, other):
    heads = {**under("teacher.dino_head.", HEAD), **under("student.dino_head.", HEAD)}
    return {**under("teacher.backbone.", w), **under("student.backbone.", other), **heads}


def taught(w, other):
    return lightning(w, other, state_dict={**under("teacher.", w), **under("model.", other)})


def lightly(w, other):
    return {**under("x.teacher_backbone.model.", w), **under("x.student_backbone.model.", other)}


@pytest.mark.parametrize(
    ("make", "student", "teacher"),
    [
        (dino, "student", "teacher"),
        (dinov2, "student", "teacher"),
        (lightly, "student_backbone", "teacher_backbone"),
        (taught, "model", "teacher"),
    ],
    ids=["dino", "dinov2", "lightly", "lightning"],
)
def test_of_a_student_and_a_teacher_the_user_chooses(tmp_path, states, make, student, teacher):
    path = tmp_path / "model.pth"
    torch.save(make(*states), path)
    said = refusal(path, model=NAME, model_args=ARGS)
    assert f"found 2 networks. Choose with part={student!r} or part={teacher!r}" in said
    for part, state in zip((teacher, student), states, strict=True):
        assert torch.equal(logits_of(path, part=part)[0], logits_with(state))
    said = refusal(path, model=NAME, model_args=ARGS, part="pupil")
    assert "part='pupil': no such part" in said or "found 2 networks" in said


def test_the_user_chooses_another_part(tmp_path, states):
    path = tmp_path / "model.pth"
    torch.save(IN_TORCH_FILES["i-jepa"][0](*states), path)
    found, notes = logits_of(path, part="target_encoder")
    assert torch.equal(found, logits_with(states[1]))
    assert any("read the part 'target_encoder'" in note for note in notes)
    said = refusal(path, model=NAME, model_args=ARGS, part="pupil")
    assert "part='pupil': no such part. Choose from" in said
    assert "'target_encoder'" in said
    torch.save(dinov2(*states), path)
    assert torch.equal(load_model(path, NAME, part="teacher", **ARGS)(IMAGES), logits_with(states[0]))


def test_what_has_no_parts_says_so(tmp_path, states):
    path = save(tiny(), tmp_path / "plain.safetensors")
    said = refusal(path, model=NAME, model_args=ARGS, part="model")
    assert "no such part. Choose from 'blocks', 'cls_token'" in said
    make_slim(path, tmp_path / "slim.safetensors", model=NAME, model_args=ARGS)
    assert load_model(tmp_path / "slim.safetensors", part="model") is not None  # of several checkpoints


def without_head(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


@pytest.mark.parametrize(
    ("network", "layer", "part"),
    [
        ("backbone.", "head.", "backbone"),
        ("model.backbone.", "model.classifier.", "backbone"),
        ("module.encoder.", "module.linear.", "encoder"),
        ("model.", "head.1.", "model"),
        ("backbone.model.", "head.", "backbone"),
    ],
)
def test_a_classifier_beside_a_network_is_left_out_on_request(tmp_path, states, network, layer, part):
    path = tmp_path / "model.pth"
    classifier = {f"{layer}{kind}": states[0][f"head.{kind}"] for kind in ("weight", "bias")}
    torch.save({**under(network, without_head(states[0])), **classifier}, path)
    assert f"Use part={part!r} to ignore them" in refusal(path, model=NAME, model_args=ARGS)
    alone = read_model(path, model=NAME, model_args=ARGS, part=part)
    assert alone.identity.model_args["num_classes"] == 0


def test_what_may_belong_to_the_model_is_not_left_out(tmp_path, states):
    beside = {"adapter.weight": torch.ones(10, 48), "adapter.bias": torch.ones(10)}
    path = save(tiny(num_classes=0), tmp_path / "plain.safetensors")
    bare = without_head(states[0])
    save_file({**under("backbone.", bare), **beside}, path)
    said = refusal(path, model=NAME, model_args=ARGS)
    assert "found other tensors next to 'backbone'" in said
    assert "part='backbone' to ignore them" in said
    loaded = read_model(path, model=NAME, model_args=ARGS, part="backbone")
    assert loaded.identity.model_args["num_classes"] == 0
    assert any("left out adapter" in note for note in loaded.notes)
    save_file({**states[0], "adapter.weight": torch.ones(2)}, path)
    assert "1 unexpected" in refusal(path, model=NAME, model_args=ARGS)
    save_file({"model.a.b": torch.ones(2), "model.module.a.b": torch.ones(2)}, path)
    assert "model" in refusal(path, model=NAME, model_args=ARGS)


@pytest.mark.parametrize(
    "name", ["qwen3_vit_88m", "deepseek_vit_412m", "gemma4_vit_167m", "volo_d1_224", "dpn48b"]
)
def test_models_that_have_such_names_themselves_keep_them(name):
    with without_values():
        model = timm.create_model(name, num_classes=0)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert unwrap("x", shapes) == ({key: key for key in shapes}, None)
