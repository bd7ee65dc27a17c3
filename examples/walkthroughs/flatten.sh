#!/usr/bin/env bash
# A FLatten Transformer (focused linear attention), cut without images, as a folder for timm.
set -euo pipefail
examples=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${1:=$(mktemp -d)}" && cd "$1"
dense=$examples/flatten_cifar/model # official .pth files open as they are

echo "== What is in it?"
mhacut inspect "$dense"

echo "== No --data-dir: mhacut uses synthetic images, and says so."
mhacut prune "$dense" --flops 75% --effort fast --calibration-images 64 --no-latency -o slim.safetensors --overwrite

echo "== A folder with a model card, for timm and the hub."
mhacut export slim.safetensors --format timm -o slim-timm --overwrite
python - <<'PYTHON'
import mhacut  # tells timm of FLatten and of slim models
import timm
import torch

model = timm.create_model("local-dir:slim-timm", pretrained=True).eval()
images = torch.randn(2, *timm.data.resolve_model_data_config(model)["input_size"])
print("logits", tuple(model(images).shape))
print("a new head of 3 classes", tuple(timm.create_model("local-dir:slim-timm", pretrained=True, num_classes=3)(images).shape))
PYTHON
