"""``mhacut export --int8``: weights in INT8, the rest in float32, and an honest comparison of the two."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mhacut
from helpers.checkpoints import ARGS, NAME, save, tiny
from helpers.cli import document_of, succeed
from mhacut.commands.export import ExportResult
from mhacut.exporting import quantize
from mhacut.exporting.quantize import rounding_error
from mhacut.measuring.accuracy import agreement

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
QUICK = {"int8": True, "threads": 1}


@pytest.fixture(scope="module")
def exported(slim_of, tmp_path_factory) -> ExportResult:
    return mhacut.export(slim_of("vit"), output=tmp_path_factory.mktemp("int8") / "int8.onnx", **QUICK)


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(2, 7))
def test_agreement_is_that_of_a_slow_reference(seed, images, classes):
    expected, found = torch.randn(2, images, classes, generator=torch.Generator().manual_seed(seed)).tolist()
    divergences, cosines, same = [], [], 0
    for p, q in zip(expected, found, strict=True):
        total_p, total_q = sum(map(math.exp, p)), sum(map(math.exp, q))
        chances = [(math.exp(a) / total_p, math.exp(b) / total_q) for a, b in zip(p, q, strict=True)]
        divergences.append(sum(a * math.log(a / b) for a, b in chances))
        product = sum(a * b for a, b in zip(p, q, strict=True))
        cosines.append(product / math.hypot(*p) / math.hypot(*q))
        same += p.index(max(p)) == q.index(max(q))
    measured = agreement(torch.tensor(expected), torch.tensor(found), classes=True)
    assert measured.kl == pytest.approx(sum(divergences) / images, abs=1e-5)
    assert measured.cosine == pytest.approx(sum(cosines) / images, abs=1e-5)
    assert measured.same_answer == same / images


def stored(result: ExportResult) -> dict[str, np.ndarray]:
    initializers = onnx.load(result.output).graph.initializer
    return {one.name: onnx.numpy_helper.to_array(one) for one in initializers}


@pytest.mark.slow
def test_weights_are_the_model_s_to_half_a_step_of_each_output_channel(exported, slim_of):
    tensors = stored(exported)
    model = mhacut.load_model(slim_of("vit"))
    linear = [one.weight.detach().numpy() for one in model.modules() if isinstance(one, torch.nn.Linear)]
    matched = 0
    for name, weight in tensors.items():
        if weight.dtype != np.int8 or weight.ndim != 2:
            continue
        scale = tensors[name.removesuffix("_quantized") + "_scale"]
        by_output = weight if scale.shape == (weight.shape[0],) else weight.T  # Gemm's may be transposed
        assert scale.shape == (by_output.shape[0],)
        again = by_output * scale[:, None]
        same = [one for one in linear if one.shape == again.shape]
        errors = [float((abs(again - one) / scale[:, None]).max()) for one in same]
        assert min(errors) < 0.501
        matched += 1
    assert matched >= len(linear)  # q, k and v may be several


@pytest.mark.slow
def test_the_rest_stays_float32(exported):
    nodes = onnx.load(exported.output).graph.node
    readers = {
        name: {node.op_type for node in nodes if name in node.input}
        for node in nodes
        if node.op_type == "DynamicQuantizeLinear"
        for name in node.output[:1]  # then scale and zero point
    }
    assert readers
    for kinds in readers.values():
        assert kinds <= {"MatMulInteger"}
    assert {node.op_type for node in nodes} >= {"Softmax", "LayerNormalization", "DynamicQuantizeLinear"}


@pytest.mark.slow
def test_it_runs_at_any_batch_and_states_what_it_is(exported, slim_of):
    result = exported
    session = onnxruntime.InferenceSession(result.output)
    images, model = torch.randn(3, 3, 32, 32), mhacut.load_model(slim_of("vit")).requires_grad_(False)
    logits = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    difference = float((logits - model(images)).abs().max() / model(images).abs().max())
    assert 0 < difference < 0.2
    about = json.loads(session.get_modelmeta().custom_metadata_map["mhacut"])
    assert about["int8"] == {"activations": "dynamic"}
    assert about["preprocessing"]["input_size"] == [3, 32, 32]
    assert list(result.output.parent.iterdir()) == [result.output]


@pytest.mark.slow
def test_it_is_compared_with_float32(exported, slim_of, few_digits, tmp_path):
    images = {"data_dir": few_digits, "calibration_images": 24}
    with_images = mhacut.export(slim_of("vit"), output=tmp_path / "a.onnx", **QUICK, **images)
    for result, on in ((exported, "32 images of noise"), (with_images, "6 held-out of 24 of 30 images")):
        measured = result.int8
        assert measured.compared_on.startswith(on)
        assert 0 < measured.agreement.kl < quantize.FAR_KL
        assert measured.agreement.cosine > 0.99
        assert result.file_bytes < measured.float32_bytes
        assert min(measured.float32_ms, measured.int8_ms, measured.speedup) > 0
        assert measured.threads == 1


def outlying(path):
    """A ViT one of whose layers, blocks.1.mlp.fc2, reads one value far above the others, and ignores it."""
    model = tiny()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.bias[0] = 300
        model.blocks[1].mlp.fc2.weight[:, 0] = 0
    return save(model, path)


@pytest.mark.exhaustive
def test_a_layer_whose_inputs_have_outliers_stays_float32(tmp_path, monkeypatch):
    asked = {"model": NAME, "model_args": ARGS, "overwrite": True, "output": tmp_path / "a.onnx"}
    source = outlying(tmp_path / "a.safetensors")
    kept = mhacut.export(source, **asked, **QUICK).int8
    assert kept.float32_layers == ("blocks.1.mlp.fc2",)
    monkeypatch.setattr(quantize, "MAX_ROUNDING_ERROR", 1e9)
    spoiled = mhacut.export(source, **asked, **QUICK).int8
    assert spoiled.float32_layers == ()
    assert kept.agreement.kl < spoiled.agreement.kl / 3


@given(st.integers(0, 2**31), st.floats(1, 1e4))
def test_the_error_of_a_layer_is_that_of_a_slow_reference(seed, outlier):
    random = np.random.default_rng(seed)
    x, weight = random.normal(size=(3, 4)), random.normal(size=(4, 2))
    x[1, 2] *= outlier
    values = [0.0, *x.ravel().tolist()]
    grid = [min(values) + (max(values) - min(values)) / 255 * level for level in range(256)]
    shift = min(grid, key=abs)  # zero is one of the values
    grid = [value - shift for value in grid]
    total = 0.0
    for row in x.tolist():
        rounded = [min(grid, key=lambda value: abs(value - one)) for one in row]
        columns = weight.T.tolist()
        off = [sum((a - b) * c for a, b, c in zip(rounded, row, column, strict=True)) for column in columns]
        exact = [sum(b * c for b, c in zip(row, column, strict=True)) for column in columns]
        total += sum(one**2 for one in off) / sum(one**2 for one in exact)
    assert rounding_error(x, weight) == pytest.approx(total / 3, rel=1e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["swin", "flatten"])
def test_other_architectures(name, slim_of, few_digits, tmp_path):
    images = {"data_dir": few_digits, "calibration_images": 16}
    result = mhacut.export(slim_of(name), output=tmp_path / "a.onnx", **QUICK, **images)
    assert result.int8.agreement.kl < quantize.FAR_KL


@pytest.mark.slow
def test_the_command(slim_of, few_digits, tmp_path):
    file = tmp_path / "model.onnx"
    flags = ["--int8", "--data-dir", few_digits, "--calibration-images", "16", "-o", file]
    result = succeed("export", slim_of("vit"), *flags)
    for words in (
        "INT8 compared with float32, on 4 held-out",
        "x faster",
        "x smaller",
        ", INT8\ndifference: largest difference between INT8 and float32 outputs",
    ):
        assert words in result.stdout
    assert "WARNING" not in result.stderr
    document = document_of("export", slim_of("vit"), *flags, "--overwrite")
    assert document["int8"]["agreement"]["kl"] > 0


def test_no_shape_is_stated_twice_of_weights_that_the_quantizer_transposes(tmp_path):
    floats, path = onnx.TensorProto.FLOAT, tmp_path / "a.onnx"
    weight = onnx.numpy_helper.from_array(np.ones((5, 48), np.float32), "weight")
    shapes = {"x": (1, 48), "y": (1, 5), "weight": (5, 48), "inner": (1, 5)}
    info = {name: onnx.helper.make_tensor_value_info(name, floats, shape) for name, shape in shapes.items()}
    nodes = [
        onnx.helper.make_node("Gemm", ["x", "weight"], ["inner"], transB=1),
        onnx.helper.make_node("Relu", ["inner"], ["y"]),
    ]
    stated = [info["weight"], info["inner"]]
    graph = onnx.helper.make_graph(nodes, "a", [info["x"]], [info["y"]], [weight], value_info=stated)
    onnx.save(onnx.helper.make_model(graph), path)
    quantize._forget_shapes_of_weights(path)
    assert [info.name for info in onnx.load(path).graph.value_info] == ["inner"]
