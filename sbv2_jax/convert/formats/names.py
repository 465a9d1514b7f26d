"""The one rule between PyTorch's tensors and ours: the last part of the name, and the axes' order.

    weight [out, in]        <->  kernel [in, out]          dense layer
    weight [out, in, h, w]  <->  kernel [h, w, in, out]    convolution
    weight [n, d]           <->  embedding [n, d]          embedding table
    weight [c]              <->  scale [c]                 normalisation

Everything before the last part is the same on both sides, because the models mirror the module names.
"""

from collections.abc import Mapping

import numpy as np

from sbv2_jax.tree import Shapes, require_same

_WEIGHTS = ("kernel", "embedding", "scale")


def torch_name(name: str) -> str:
    """Returns PyTorch's name for a parameter of ours."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.weight" if leaf in _WEIGHTS else name


def torch_names(shapes: Shapes) -> dict[str, str]:
    """Maps PyTorch's name of every parameter to ours."""
    return {torch_name(name): name for name in shapes}


def to_ours(name: str, tensor: np.ndarray) -> np.ndarray:
    """Returns a PyTorch tensor in our axes' order, as a view; `name` is ours."""
    if name.endswith(".kernel"):
        return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.transpose()
    return tensor


def to_torch(name: str, array: np.ndarray) -> np.ndarray:
    """Returns a parameter of ours in PyTorch's axes' order, as a view; `name` is ours."""
    if name.endswith(".kernel"):
        return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.transpose()
    return array


def params_from_torch(
    tensors: Mapping[str, np.ndarray], shapes: Shapes, source: str = "the state dict"
) -> dict[str, np.ndarray]:
    """Converts a PyTorch state dict of NumPy arrays to our parameters, dtypes kept.

    Raises InputError that lists every missing or extra name and every wrong shape, named as in `source`.
    """
    expected = {
        torch_name(name): to_torch(name, np.broadcast_to(np.float32(0), leaf.shape))
        for name, leaf in shapes.items()
    }
    require_same(tensors, expected, source, "the network of its config.json")
    return {name: to_ours(name, tensors[torch_name(name)]) for name in shapes}


def params_to_torch(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts our parameters to a PyTorch state dict of contiguous NumPy arrays, dtypes kept."""
    return {
        # not ascontiguousarray, which makes a vector of a scalar
        torch_name(name): np.asarray(to_torch(name, np.asarray(array)), order="C")
        for name, array in params.items()
    }
