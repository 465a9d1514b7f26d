"""LoRA files changed on disk: their tensors, and what their metadata says."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

RANK, ALPHA = 4, 8.0


def rewritten(file: Path, directory: Path, change=None, **metadata: object) -> Path:
    """The file with other tensors and with settings in its metadata as given; without any, with none."""
    tensors = load_file(file)
    if change is not None:
        change(tensors)
    path = directory / "changed.safetensors"
    text = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
    save_file(tensors, path, metadata=text)
    return path


def with_alphas(tensors: dict[str, np.ndarray], alpha: np.ndarray | float = ALPHA) -> None:
    for name in [name for name in tensors if "lora_A" in name]:
        tensors[name.replace("lora_A.weight", "alpha")] = np.asarray(alpha)
