"""Calibrations that several runs of ``mhacut prune`` share: variants of one seed mostly see the same."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import torch

from mhacut.pruning import job

_calibrate = job.calibrate
_FISHER = ("fisher_images", "seed", "token_importance", "preserved")
"""Arguments that decide the Fisher information."""


class SharedCalibration:
    """Calibrates in place of mhacut's own function, and keeps what it found in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved_s = 0.0
        """CPU seconds that an earlier run spent in place of this one."""

    def __call__(self, model: Any, prunable: Any, images: torch.Tensor, **about: Any) -> Any:
        """As :func:`mhacut.pruning.calibrate.calibrate`."""
        key = hashlib.sha256(f"{model} {about['batch_size']} {[about[name] for name in _FISHER]}".encode())
        with torch.inference_mode():
            probe = model(images[:1])  # what a model merges is not in its tensors
        for tensor in (images, probe, *model.state_dict().values()):
            key.update(tensor.cpu().contiguous().numpy().tobytes())
        file = self.folder / f"calibration-{key.hexdigest()}.pt"
        if file.exists():
            found = torch.load(file, weights_only=False)  # of this very run of the script
            self.saved_s += found["cpu_s"]
            return found["calibration"]
        began = time.process_time()
        calibration = _calibrate(model, prunable, images, **about)
        torch.save({"calibration": calibration, "cpu_s": time.process_time() - began}, file)
        return calibration
