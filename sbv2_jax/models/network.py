"""A model definition as pure functions over a flat dictionary of parameters."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sbv2_jax.models.layers import LoRAScale
from sbv2_jax.models.lora import fresh_factors
from sbv2_jax.tree import Params, Shapes, require_same


class Network:
    """An NNX model, split once: what is static stays here, the parameters are passed to every call.

    `build` takes the random streams that NNX layers ask for and returns the model; the layers are built for
    their shapes alone. `shapes` holds the abstract parameters by dotted name. Nothing is allocated here.
    The arithmetic follows the dtype of the parameters: pass bfloat16 ones for a bfloat16 forward.
    """

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module]):
        model = build(_NoRandomness())
        self.name = type(model).__name__
        self._graphdef, state = nnx.split(model)
        self._variables = nnx.to_flat_state(state)
        # Sorted, as JAX sorts the leaves of every dictionary.
        self.shapes: Shapes = {
            name: jax.ShapeDtypeStruct(shape.shape, shape.dtype) for name, shape in sorted(_parameters(state))
        }

    def init(self, seed: int) -> dict[str, np.ndarray]:
        """Returns freshly initialised float32 parameters on the host, the same ones on any mesh.

        Kernels are normal with variance 1 / fan-in (LeCun), embeddings normal with deviation 0.02, norm scales
        one, biases zero, and a LoRA starts as `fresh_factors` says.
        """
        rng, factors = np.random.default_rng(seed), fresh_factors(self.shapes, seed)
        return {
            name: factors[name] if name in factors else _initial(rng, name, shape.shape)
            for name, shape in self.shapes.items()
        }

    def apply(
        self,
        params: Params,
        *args: Any,
        method: str = "__call__",
        lora_scale: float | jax.Array = 1.0,
        **kwargs: Any,
    ) -> Any:
        """Calls the model, or the named method of it, with these parameters.

        `lora_scale`, a scalar or one factor for each sample [B], multiplies the output of every LoRA in the
        network: alpha / rank switches them on, 0 off.
        Raises InputError that lists every name or shape that does not fit the model.
        """
        require_same(params, self.shapes, "the parameters given", self.name)
        scale = jnp.asarray(lora_scale)
        flat = [
            (path, variable.replace(scale if isinstance(variable, LoRAScale) else params[_dotted(path)]))
            for path, variable in self._variables
        ]
        module = nnx.merge(self._graphdef, nnx.from_flat_state(flat))
        return getattr(module, method)(*args, **kwargs)


class _NoRandomness(nnx.Rngs):
    """Stands for the streams of keys that NNX layers take: ours draw nothing when they are built (see `init`)."""

    def __init__(self):
        super().__init__()

    def params(self) -> None:
        return None


def _initial(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    leaf = name.rpartition(".")[2]
    if leaf == "logit_scale":
        return np.asarray(math.log(1 / 0.07), np.float32)  # CLIP's temperature (Radford et al., 2021)
    if leaf == "scale":
        return np.ones(shape, np.float32)
    if leaf == "bias":
        return np.zeros(shape, np.float32)
    deviation = math.prod(shape[:-1]) ** -0.5 if leaf == "kernel" else 0.02
    return deviation * rng.standard_normal(shape, np.float32)


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _parameters(state: nnx.State) -> list[tuple[str, Any]]:
    return [
        (_dotted(path), variable.get_value())
        for path, variable in nnx.to_flat_state(state)
        if isinstance(variable, nnx.Param)
    ]
