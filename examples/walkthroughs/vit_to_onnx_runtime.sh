#!/usr/bin/env bash
# A fine-tuned ViT at half the cost, in ONNX Runtime on a CPU.
set -euo pipefail
examples=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${1:=$(mktemp -d)}" && cd "$1"
dense=$examples/digits/model   # yours: vit.safetensors --model vit_small_patch16_224
images=$examples/digits/images # train/<class>/ and val/<class>/

echo "== What is in it, and what could go?"
mhacut inspect "$dense"

echo "== Cut channels and merge tokens, to half the FLOPs. Images of your own kind make it better; labels are not needed."
mhacut prune "$dense" --flops 50% --data-dir "$images" -o slim.safetensors --no-latency --overwrite

echo "== Win back what was lost, with the dense model as teacher."
mhacut finetune slim.safetensors --teacher "$dense" --data-dir "$images" --epochs 2 -o run --overwrite

echo "== Is it faster here?"
mhacut bench "$dense" run/best.safetensors --runtime onnx --threads 1 --batch-sizes 1 --seconds 1

echo "== A file that needs neither mhacut nor PyTorch ..."
mhacut export run/best.safetensors --format onnx -o slim.onnx --overwrite

echo "== ... and its metadata state how to preprocess images."
python - "$images/val" <<'PYTHON'
import json, sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("slim.onnx")
told = json.loads(session.get_modelmeta().custom_metadata_map["mhacut"])["preprocessing"]
_, height, width = told["input_size"]
mean, std = (np.array(told[name], dtype=np.float32)[:, None, None] for name in ("mean", "std"))
right = 0
files = sorted(Path(sys.argv[1]).glob("*/*.png"))
for file in files:
    pixels = np.asarray(Image.open(file).convert("RGB").resize((width, height)), dtype=np.float32) / 255
    images = ((pixels.transpose(2, 0, 1) - mean) / std)[None]
    (logits,) = session.run(["logits"], {"images": images})
    right += int(logits.argmax()) == int(file.parent.name)
print(f"{right} of {len(files)} digits right")
PYTHON
