"""Export to ONNX, OpenVINO, ``torch.export``, timm and the Hugging Face hub."""
