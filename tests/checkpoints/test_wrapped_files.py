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

SIZES = {**ARGS, "num_classes": 10}
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
    "left out": (lightning, "left out criterion. (1), loss_fn. (1)"),
    "timm": (lambda w, o: {"state_dict": o, "state_dict_ema": w}, "part='state_dict' reads another part"),
    "ema": (lambda w, o: {"model": o, "ema": {"decay": 0.999, "shadow": w}}, "read the part 'ema.shadow'"),
    "tutorial": (
        lambda w, o: {"epoch": 1, "model_state_dict": w, "optimizer_state_dict": {}, "loss": torch.ones(())},
        "read the part 'model_state_dict'",
    ),
    "any name": (lambda w, o: {"my_weights": w, "my_epoch": 4}, "read the part 'my_weights'"),
    "nested": (lambda w, o: {"model": {"state_dict": under("net.", w)}}, "read the part 'model.state_dict'"),
    "dino": (dino, "part 'teacher' of the checkpoint; removed the prefix backbone. from"),
    "dino's head": (dino, "left out head. (2); part='student' reads another part"),
    "i-jepa": (
        lambda w, o: {
            "encoder": under("module.", w),
            "predictor": {"module.blocks.0.x": torch.ones(9), "module.blocks.1.x": torch.ones(9)},
            "target_encoder": under("module.", o),
        },
        "read the part 'encoder' of the checkpoint; removed the prefix module. from the tensor names; "
        "part='target_encoder' reads another part",
    ),
    "distilled": (
        lambda w, o: {"student": w, "teacher": {"blocks.0.x": torch.ones(9), "head.y": torch.ones(9)}},
        "read the part 'student' of the checkpoint; part='teacher' reads another part",
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
    "module.backbone": (lambda w, o: under("module.backbone.", w), "the prefix module.backbone. from"),
    "encoder": (lambda w, o: under("encoder.", w), "removed the prefix encoder. from"),
    "own word": (lambda w, o: under("my_vit.", w), "removed the prefix my_vit. from"),
    "loss beside": (lambda w, o: {**w, "criterion.weight": torch.ones(10)}, "left out criterion. (1)"),
    "averaged": (
        lambda w, o: {**under("model.", o), **under("ema_model.module.", w)}
        | {"ema_model.n_averaged": torch.tensor(3)},
        "left out model. (32), n_averaged (1); part='model' reads another part",
    ),
    "dinov2": (
        lambda w, o: {**under("teacher.backbone.", w), **under("teacher.dino_head.", HEAD)}
        | {**under("student.backbone.", o), **under("student.dino_head.", HEAD)},
        "removed the prefix teacher.backbone. from the tensor names; left out dino_head. (2), student. ",
    ),
    "lightly": (
        lambda w, o: {**under("teacher_backbone.", w), **under("student_backbone.", o)}
        | {f"{word}_head.layers.0.weight": torch.ones(3, 2) for word in ("student", "teacher")}
        | {f"{word}_head.last_layer.weight_g": torch.ones(3, 1) for word in ("student", "teacher")},
        "part='student_backbone' reads another part",
    ),
    "solo-learn": (
        lambda w, o: {**under("backbone.", without_head(w)), **under("momentum_backbone.", without_head(o))}
        | {f"classifier.{kind}": w[f"head.{kind}"] for kind in ("weight", "bias")}
        | {"projector.0.weight": torch.ones(3, 2), "momentum_projector.0.weight": torch.ones(3, 2)},
        "left out momentum_backbone. (30), momentum_projector. (1), projector. (1); part='momentum_backbone'",
    ),
    "distilling": (
        lambda w, o: {**under("model.", w), **under("teacher.", {"stem.weight": torch.ones(2)})},
        "the prefix model. from the tensor names; left out teacher. (1); part='teacher' reads another part",
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


def test_the_user_chooses_another_part(tmp_path, states):
    path = tmp_path / "dino.pth"
    torch.save(dino(*states), path)
    found, notes = logits_of(path, part="student")
    assert torch.equal(found, logits_with(states[1]))
    assert any("read the part 'student'" in note for note in notes)
    torch.save(IN_TORCH_FILES["i-jepa"][0](*states), path)
    assert torch.equal(logits_of(path, part="target_encoder")[0], logits_with(states[1]))
    torch.save(IN_ANY_FILE["dinov2"][0](*states), path)
    assert torch.equal(logits_of(path, part="student")[0], logits_with(states[1]))
    assert torch.equal(load_model(path, NAME, part="teacher", **ARGS)(IMAGES), logits_with(states[0]))
    said = refusal(path, model=NAME, model_args=ARGS, part="pupil")
    assert "part='pupil': no such part. Choose from" in said
    assert "'student'" in said


TAUGHT = {
    "model": lambda w, o: lightning(w, o, state_dict={**under("model.", w), **under("teacher.", o)}),
    "student": lambda w, o: {"student": under("module.", w), "teacher": o, "epoch": 3},
    "student_backbone": lambda w, o: (
        {**under("x.student_backbone.model.", w), **under("x.teacher_backbone.model.", o)}
    ),
}


@pytest.mark.parametrize("own", TAUGHT)
def test_a_teacher_with_a_classifier_may_be_another_network(tmp_path, states, own):
    path, teacher = tmp_path / "model.pth", "teacher_backbone" if "_" in own else "teacher"
    torch.save(TAUGHT[own](*states), path)
    found, notes = logits_of(path)
    assert torch.equal(found, logits_with(states[0]))
    assert any(f"part={teacher!r} reads another part" in note for note in notes)
    assert torch.equal(logits_of(path, part=teacher)[0], logits_with(states[1]))


def test_what_has_no_parts_says_so(tmp_path, states):
    path = save(tiny(), tmp_path / "plain.safetensors")
    said = refusal(path, model=NAME, model_args=ARGS, part="model")
    assert "no such part. Choose from 'blocks', 'cls_token'" in said
    make_slim(path, tmp_path / "slim.safetensors", model=NAME, model_args=ARGS)
    assert load_model(tmp_path / "slim.safetensors", part="model") is not None  # of several checkpoints


def without_head(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


@pytest.mark.parametrize(
    ("network", "layer", "trunk", "word"),
    [
        ("backbone.", "head.", "backbone", "head"),
        ("backbone.", "fc.", "backbone", "fc"),
        ("model.backbone.", "model.classifier.", "backbone", "classifier"),
        ("module.encoder.", "module.linear.", "encoder", "linear"),
        ("model.", "head.1.", "model", "head"),
        ("model.", "heads.0.", "model", "heads"),
        ("backbone.model.", "head.", "backbone", "head"),
    ],
)
def test_a_linear_layer_beside_a_network_is_its_classifier(tmp_path, states, network, layer, trunk, word):
    path = tmp_path / "model.pth"
    classifier = {f"{layer}{kind}": states[0][f"head.{kind}"] for kind in ("weight", "bias")}
    torch.save({**under(network, without_head(states[0])), **classifier}, path)
    found, notes = logits_of(path)
    assert torch.equal(found, logits_with(states[0]))
    line = f"{word}. next to {trunk}. is used as the classifier of its pooled features (global_pool=token); "
    assert f"{line}part='{trunk}' drops it" in notes, notes
    alone = read_model(path, model=NAME, model_args=ARGS, part=trunk)
    assert alone.identity.model_args["num_classes"] == 0
    assert not any("is used as" in note for note in alone.notes)


@pytest.mark.parametrize(
    ("network", "layer"), [("", "head.1."), ("model.", "model.head.0."), ("backbone.", "fc.2.")]
)
def test_a_classifier_may_be_the_only_layer_of_a_sequence(tmp_path, states, network, layer):
    path = tmp_path / "model.pth"
    classifier = {f"{layer}{kind}": states[0][f"head.{kind}"] for kind in ("weight", "bias")}
    torch.save({**under(network, without_head(states[0])), **classifier}, path)
    assert torch.equal(logits_of(path)[0], logits_with(states[0]))
    torch.save(
        {**without_head(states[0]), "head.0.weight": torch.ones(48, 48), "head.2.weight": torch.ones(10, 48)},
        path,
    )
    assert "'head.2.weight'" in refusal(path, model=NAME, model_args=ARGS)


def test_a_classifier_of_other_features_is_refused(tmp_path, states):
    path = tmp_path / "model.pth"
    torch.save({**under("backbone.", without_head(states[0])), "head.weight": torch.ones(10, 96)}, path)
    said = refusal(path, model=NAME, model_args=ARGS)
    assert "'head.weight' expected [10, 48], found [10, 96]" in said
    assert "part='backbone' to ignore them" in refused_beside(
        path, states, {"head.0.weight": torch.ones(9, 48), "head.2.weight": torch.ones(10, 9)}
    )
    said = refused_beside(
        path, states, {"head.mlp.0.weight": torch.ones(9, 48), "head.mlp.2.weight": torch.ones(10, 9)}
    )
    assert "'head.mlp.0.weight', 'head.mlp.2.weight'. " in said
    assert "part='backbone' to ignore them" in said
    assert (
        read_model(path, model=NAME, model_args=ARGS, part="backbone").identity.model_args["num_classes"] == 0
    )
    two = {"head.weight": torch.ones(10, 48), "fc.weight": torch.ones(10, 48)}
    assert "part='backbone' to ignore them" in refused_beside(path, states, two)
    both = {"model.cls_head.weight": torch.ones(10, 48), "fc.weight": torch.ones(10, 48)}
    torch.save({**under("model.backbone.", without_head(states[0])), **both}, path)
    assert "found other tensors next to" in refusal(path, model=NAME, model_args=ARGS)
    torch.save({**under("backbone.", states[0]), "fc.weight": torch.ones(3, 10)}, path)
    assert "part='backbone' to ignore them" in refusal(path, model=NAME, model_args=ARGS)
    torch.save({**under("backbone.model.", states[0]), "fc.weight": torch.ones(3, 10)}, path)
    assert "part='backbone' to ignore them" in refusal(path, model=NAME, model_args=ARGS)


def refused_beside(path, states, tensors):
    torch.save({**under("backbone.", without_head(states[0])), **tensors}, path)
    return refusal(path, model=NAME, model_args=ARGS)


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
    assert any("left out adapter. (2)" in note for note in loaded.notes)
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
    assert unwrap("x", shapes).names == {key: key for key in shapes}
