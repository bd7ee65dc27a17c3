"""Time and compare a dense and a pruned model in float32 and INT8, in ONNX Runtime and OpenVINO.

    python examples/benchmarks/quantization.py DENSE SLIM --model vit_tiny_patch16_224 --data-dir images/

All take turns on one image and one thread, in CPU time; KL divergence is from the dense float32 model on
validation images, and the largest difference of an output from PyTorch's with the same float32 weights. INT8
is what ``mhacut export --int8`` writes without images.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time

import torch
from process import describe_machine

from mhacut.checkpoint.load import read_model
from mhacut.checkpoint.preprocessing import resolve_preprocessing
from mhacut.data import calibration_images
from mhacut.exporting.quantize import layers_with_outliers, quantize
from mhacut.exporting.runtimes import onnx_content, onnx_runner, openvino_runner
from mhacut.measuring.accuracy import agreement
from mhacut.measuring.latency import fixed_images, run_of, take_turns
from mhacut.options.base import DataOptions, PreprocessingOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("slim")
    parser.add_argument("--model", help="timm architecture of DENSE, where its file does not state it")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--images", type=int, default=256, help="validation images to compare on")
    parser.add_argument("--seconds", type=float, default=20, help="time to measure, all together")
    args = parser.parse_args()
    torch.set_num_threads(1)
    programs, sizes, networks = {}, {}, {}
    for name, path, model in (("dense", args.dense, args.model), ("slim", args.slim, None)):
        checkpoint = read_model(path, model=model)
        preprocessing = resolve_preprocessing(checkpoint, PreprocessingOptions())
        network, size = checkpoint.model.requires_grad_(False), preprocessing.input_size
        networks[name] = network
        exact = onnx_content(network, size)
        int8 = quantize(exact, exclude=layers_with_outliers(exact, [fixed_images(8, size)]))
        for kind, content in (("float32", exact), ("INT8", int8)):
            programs[f"{name} {kind}"] = onnx_runner(content, 1)
            sizes[f"{name} {kind}"] = len(content) / 1e6
        if importlib.util.find_spec("openvino") is not None:
            programs[f"{name} OpenVINO"] = openvino_runner(network, size, threads=1)
    data = DataOptions(data_dir=args.data_dir, train_split="val")
    images = calibration_images(preprocessing, data, count=args.images, seed=0, use_labels=False).images
    outputs = {name: torch.cat([run(image) for image in images.split(1)]) for name, run in programs.items()}
    with torch.inference_mode():
        reference = {
            name: torch.cat([run(image) for image in images.split(1)]) for name, run in networks.items()
        }
    runs = [run_of(run, fixed_images(1, size)) for run in programs.values()]
    device = torch.device("cpu")
    times = take_turns(runs, seconds=args.seconds, device=device, clock=time.process_time)
    print(json.dumps({"machine": describe_machine(1), "images": args.images}))
    for name, own in zip(programs, times, strict=True):
        found = agreement(outputs["dense float32"], outputs[name], classes=True)
        ratios = [first / seconds for first, seconds in zip(times[0], own, strict=True)]
        row = {
            "program": name,
            "ms": 1000 * statistics.median(own),
            "speedup": statistics.median(ratios),
            "mb": sizes.get(name),
            "kl": found.kl,
            "difference": float((outputs[name] - reference[name.split()[0]]).abs().max()),
            "same_first_class": found.same_answer,
            "rounds": len(own),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
