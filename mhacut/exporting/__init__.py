"""Checkpoints for other programs: ONNX Runtime, OpenVINO, ``torch.export``, timm, the hub."""
