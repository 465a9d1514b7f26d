"""Scaled dot-product attention, and the kernels that take it over where a platform has a better one."""

import abc
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
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    heads: int,
    *,
    core: Core | None = None,
    causal: bool = False,
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


@dataclasses.dataclass(frozen=True)
class Kernel(abc.ABC):
    """Attention by a kernel that runs on each device's part of a batch, which is split over all axes of the mesh.

    XLA does what the kernel does not take, and a batch that the devices do not divide.
    """

    mesh: Mesh

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """Calls the kernel, or XLA."""
        if query.shape[0] % self.mesh.size or not self._takes(query, key):
            return xla(query, key, value)
        batch = PartitionSpec(self.mesh.axis_names)
        return jax.shard_map(
            self._local, mesh=self.mesh, in_specs=(batch,) * 3, out_specs=batch, check_vma=False
        )(query, key, value)

    @abc.abstractmethod
    def _takes(self, query: jax.Array, key: jax.Array) -> bool: ...

    @abc.abstractmethod
    def _local(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Cudnn(Kernel):
    """Attention by cuDNN's flash kernels, for 16-bit values of a head dimension that they take.

    Each device calls them on its own: JAX's way to split the call has an address in the program, so that no later
    process finds it among the compiled ones, and refuses a query that is split unlike its key.
    """

    def _takes(self, query: jax.Array, key: jax.Array) -> bool:
        dim = query.shape[-1]
        return query.dtype in (jnp.bfloat16, jnp.float16) and dim % 8 == 0 and dim <= 128

    def _local(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


@dataclasses.dataclass(frozen=True)
class Splash(Kernel):
    """Attention by TPU's splash kernel: the scores never leave the chip's vector memory.

    It takes self-attention of at least `SMALLEST_SPLASH` tokens, in multiples of 128; XLA takes the rest, the
    77 tokens of a text above all. `interpret` runs the kernel's program on any platform, slowly.
    """

    interpret: bool = False

    def _takes(self, query: jax.Array, key: jax.Array) -> bool:
        tokens = query.shape[1]
        return tokens == key.shape[1] and tokens >= SMALLEST_SPLASH and tokens % 128 == 0

    def _local(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        _, tokens, heads, dim = query.shape
        kernel = _splash_kernel(tokens, heads, self.interpret)
        heads_first = (x.swapaxes(1, 2) for x in (query * dim**-0.5, key, value))
        return jax.vmap(kernel)(*heads_first).swapaxes(1, 2)


def _splash_kernel(tokens: int, heads: int, interpret: bool) -> Callable:
    block = next(size for size in (_BLOCK, 256, 128) if tokens % size == 0)
    sizes = splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
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
        # On one device of this process: other processes try their own.
        _try(Cudnn(Mesh(mesh.local_devices[:1], "device")), dtype)
    except Exception as error:  # noqa: BLE001 (whatever it is, there is another way)
        logging.warning(
            "cuDNN's attention does not work here, XLA's is taken: %s", str(error).partition("\n")[0]
        )
        return None
    return Cudnn(mesh)


def _try(core: Core, dtype: jnp.dtype) -> None:
    """Runs a core forward and backward."""
    x = jnp.ones((1, 128, 1, 64), dtype)
    jax.block_until_ready(jax.jit(jax.grad(lambda q: core(q, x, x).sum().astype(jnp.float32)))(x))
