"""Random tensors of every type that safetensors files hold."""

import ml_dtypes
import numpy as np

from sbv2_jax.convert.formats.safetensors_io import DTYPES, TensorInfo

STEM = "model"


def tensors(rng) -> dict[str, np.ndarray]:
    return {
        "a.weight": rng.standard_normal((3, 5)).astype(np.float32),
        "b.weight": rng.standard_normal((2, 3, 1, 1)).astype(np.float16),
        "c.weight": rng.standard_normal(7).astype(ml_dtypes.bfloat16),
        "logit_scale": np.asarray(2.5, np.float32),
        "none": np.zeros((0, 4), np.float32),
    }


def infos(arrays: dict[str, np.ndarray]) -> dict[str, TensorInfo]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {name: TensorInfo(names[array.dtype], array.shape) for name, array in arrays.items()}
