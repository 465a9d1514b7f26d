"""What the tests of parity with PyTorch modules share: random weights, conversion, axes and the bound."""

import numpy as np
import torch

from sbv2_jax.convert.formats.names import params_from_torch
from sbv2_jax.models.network import Network

BOUND = 1e-4


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Draws every parameter so that all of them matter and activations keep about unit scale."""
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim < 2:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return module.eval()


def params_of(module: torch.nn.Module, network: Network) -> dict[str, np.ndarray]:
    return params_from_torch(
        {name: tensor.numpy() for name, tensor in module.state_dict().items()}, network.shapes
    )


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).contiguous()


def nhwc(x: torch.Tensor) -> np.ndarray:
    """Returns the array, once it is seen to vary enough over the pixels for a comparison to mean much."""
    array = x.detach().permute(0, 2, 3, 1).numpy()
    assert array.std(axis=(1, 2)).max() > 0.05 * np.abs(array).max()
    return array
