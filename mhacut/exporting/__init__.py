"""Checkpoints for other programs: ONNX Runtime, ``torch.export``, timm."""
