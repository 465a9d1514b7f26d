"""Scaled dot-product attention, and the kernels that take it over where a platform has a better one."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import Mesh, PartitionSpec

# Below this many tokens the scores are small, and XLA fuses what a kernel would cut apart.
SMALLEST_SPLASH = 256
_BLOCK = 512

# Takes query [B, N, heads, D], key and value [B, M, heads, D]; returns [B, N, heads, D].
Core = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, heads: int, *, core: Core | None = None, causal=False
) -> jax.Array:
    """Multi-head scaled dot-product attention.

    query [B, N, heads * D], key and value [B, M, heads * D]; returns [B, N, heads * D]. `core` computes it
    from the separate heads, unless it is causal; without one, XLA does.
    """

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], x.shape[1], heads, x.shape[2] // heads)

    if core is None or causal:
        core = functools.partial(xla, causal=causal)
    return core(split(query), split(key), split(value)).reshape(query.shape)


def xla(query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool = False) -> jax.Array:
    """Attention as XLA compiles it, with float32 scores: memory grows with N * M."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=causal)


def cudnn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention by cuDNN's flash kernels, for 16-bit values of a head dimension that they take."""
    dim = query.shape[-1]
    if query.dtype not in (jnp.bfloat16, jnp.float16) or dim % 8 or dim > 128:
        return xla(query, key, value)
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


@dataclasses.dataclass(frozen=True)
class Splash:
    """Attention by TPU's splash kernel: the scores never leave the chip's vector memory.

    It takes self-attention of at least `SMALLEST_SPLASH` tokens, in multiples of 128; XLA takes the rest, the
    77 tokens of a text above all. The batch is split over all axes of the mesh. `interpret` runs the kernel's
    program on any platform, slowly.
    """

    mesh: Mesh
    interpret: bool = False

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """Calls the kernel, or XLA."""
        tokens = query.shape[1]
        if (
            tokens != key.shape[1]
            or tokens < SMALLEST_SPLASH
            or tokens % 128
            or query.shape[0] % self.mesh.size
        ):
            return xla(query, key, value)
        batch = PartitionSpec(self.mesh.axis_names)
        return jax.shard_map(
            self._local, mesh=self.mesh, in_specs=(batch,) * 3, out_specs=batch, check_vma=False
        )(query, key, value)

    def _local(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        _, tokens, heads, dim = query.shape
        kernel = _splash_kernel(tokens, heads, self.interpret)
        heads_first = (x.swapaxes(1, 2) for x in (query * dim**-0.5, key, value))
        return jax.vmap(kernel)(*heads_first).swapaxes(1, 2)


def _splash_kernel(tokens: int, heads: int, interpret: bool) -> Callable:
    block = next(size for size in (_BLOCK, 256, 128) if tokens % size == 0)
    sizes = splash_attention.BlockSizes(
        **{f"block_{name}": block for name in ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")}
    )
    mask = splash_attention.MultiHeadMask([splash_attention.FullMask((tokens, tokens))] * heads)
    return splash_attention.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )


def choose(mesh: Mesh, dtype: jnp.dtype) -> Core | None:
    """Returns the kernel for the mesh's platform and this dtype, or None for XLA's own.

    On a GPU it is tried once: where cuDNN fails, a warning says so and XLA takes its place.
    """
    platform = mesh.devices.flat[0].platform
    if platform == "tpu":
        return Splash(mesh)
    if platform != "gpu" or dtype not in (jnp.bfloat16, jnp.float16):
        return None
    try:
        probe = jnp.ones((1, 128, 1, 64), dtype)
        jax.block_until_ready(
            jax.jit(jax.grad(lambda q: cudnn(q, probe, probe).sum().astype(jnp.float32)))(probe)
        )
    except Exception as error:  # noqa: BLE001 (whatever it is, there is another way)
        logging.warning(
            "cuDNN's attention does not work here, XLA's is taken: %s", str(error).splitlines()[0]
        )
        return None
    return cudnn
