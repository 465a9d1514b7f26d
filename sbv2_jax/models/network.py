"""A model definition as pure functions over a flat dictionary of parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sbv2_jax.models.layers import LoRAScale
from sbv2_jax.tree import Params, Shapes, require_same


class Network:
    """An NNX model, split once: what is static stays here, the parameters are passed to every call.

    `shapes` holds the abstract parameters by dotted name. Nothing is allocated before `init`.
    The arithmetic follows the dtype of the parameters: pass bfloat16 ones for a bfloat16 forward.
    """

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module]):
        self._build = build
        model = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
        self.name = type(model).__name__
        self._graphdef, state = nnx.split(model)
        self._variables = nnx.to_flat_state(state)
        # Sorted, as JAX sorts the leaves of every dictionary.
        self.shapes: Shapes = {
            name: jax.ShapeDtypeStruct(shape.shape, shape.dtype) for name, shape in sorted(_parameters(state))
        }

    def init(self, key: jax.Array) -> Params:
        """Returns freshly initialised float32 parameters; pure, so it can be jitted with shardings."""
        return dict(sorted(_parameters(nnx.state(self._build(nnx.Rngs(key))))))

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


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _parameters(state: nnx.State) -> list[tuple[str, Any]]:
    return [
        (_dotted(path), variable.get_value())
        for path, variable in nnx.to_flat_state(state)
        if isinstance(variable, nnx.Param)
    ]
