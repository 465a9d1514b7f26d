"""How the stages of a step become programs: all inside one, or each compiled on its own.

A step is written once, over `Programs`: every stage goes through `run`, every loop through `fold` or `average`.
Inline, these are the plain call and `lax.scan`, for a function that is jitted as a whole. `Separate` makes
each stage a program and each loop one of Python, with the arrays between them left on the devices: the largest
program is then a third as large, and so is the memory that its compilation takes.
"""

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from absl import logging


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the arrays between stages lie: shardings, or None where the compiler may choose.

    `batch` splits the leading axis, `batches` the axis after it, and `whole` replicates. `state` holds a sharding
    for each leaf of the state.
    """

    batch: Any = None
    batches: Any = None
    whole: Any = None
    state: Any = None

    def player(self, name: str) -> Any:
        """Where a player and its optimizer's state lie."""
        return None if self.state is None else self.state.players[name]

    def params(self, name: str) -> Any:
        """Where a player, and so its gradient, lies."""
        return None if self.state is None else self.state.players[name].params


ANYWHERE = Placement()


class Programs(Protocol):
    """What a step is written over."""

    def run(
        self, name: str, function: Callable, *args: Any, out: Any = None, donate: tuple[int, ...] = ()
    ) -> Any:
        """Returns `function(*args)`.

        `name` stands for the function, which closes over nothing but what is static. `out` is a tree prefix of
        the result's shardings, with None where they are free; `donate` tells which arguments are used up.
        """

    def fold(self, name: str, body: Callable, carry: Any, xs: Any) -> tuple[Any, Any]:
        """Returns what `jax.lax.scan(body, carry, xs)` returns."""

    def average(self, name: str, one_pass: Callable, passes: int, args: tuple) -> tuple[Any, Any]:
        """Runs `one_pass(*args) -> (to average, per sample)` over the batch in equal parts.

        Every part takes samples from every device, so that the leading axis keeps its sharding.
        """


class Inline:
    """Everything in one program, that of the caller."""

    def run(
        self, name: str, function: Callable, *args: Any, out: Any = None, donate: tuple[int, ...] = ()
    ) -> Any:
        """Calls the function, and lays its result out."""
        return _prefixed(
            lambda sharding, part: jax.lax.with_sharding_constraint(part, sharding), out, function(*args)
        )

    def fold(self, name: str, body: Callable, carry: Any, xs: Any) -> tuple[Any, Any]:
        """Scans; a single iteration stays straight-line code, for XLA's CPU backend runs loops on one core."""
        if _length(xs) > 1:
            return jax.lax.scan(body, carry, xs)
        carry, out = body(carry, jax.tree.map(lambda a: a[0], xs))
        return carry, jax.tree.map(lambda a: a[None], out)

    def average(self, name: str, one_pass: Callable, passes: int, args: tuple) -> tuple[Any, Any]:
        """Scans over the parts, with a running sum."""
        if passes == 1:
            return one_pass(*args)

        def body(total: Any, part: tuple) -> tuple[Any, Any]:
            value, samples = one_pass(*part)
            return _sum(total, value), samples

        parts = _parts(passes, args)
        shapes = jax.eval_shape(lambda part: one_pass(*part)[0], jax.tree.map(lambda a: a[0], parts))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, samples = jax.lax.scan(body, zeros, parts)
        return _divided(passes, total), _joined(samples)


INLINE = Inline()


class Separate:
    """A program for every stage, compiled when the step is called with shapes in place of arrays.

    A call with `jax.ShapeDtypeStruct`s that have shardings compiles what it meets and returns such shapes;
    stages whose results have known shardings compile side by side. A call with arrays then runs them.
    """

    def __init__(self, workers: int = 1, options: dict[str, Any] | None = None):
        """Takes how many programs compile at a time, and options of XLA's compiler."""
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="compile")
        self._options = options
        self._programs: dict[str, Future[jax.stages.Compiled]] = {}
        self._results: dict[str, Any] = {}

    def run(
        self, name: str, function: Callable, *args: Any, out: Any = None, donate: tuple[int, ...] = ()
    ) -> Any:
        """Runs the stage's program, or compiles it, or returns the shapes of one that was compiled before."""
        leaves = jax.tree.leaves(args)
        if not leaves:
            return function(*args)  # there is nothing to compute
        if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
            return self._programs[name].result()(*args)
        if name not in self._programs:
            jitted = jax.jit(function, out_shardings=out, donate_argnums=donate)
            lowered = jitted.lower(*args)
            self._programs[name] = self._pool.submit(self._compile, name, lowered)
            self._results[name] = self._result(name, lowered, out)
        return self._results[name]

    def fold(self, name: str, body: Callable, carry: Any, xs: Any) -> tuple[Any, Any]:
        """Loops in Python."""
        outs = []
        for x in self.run(f"{name}, split", _unstacked, xs):
            carry, out = body(carry, x)
            outs.append(out)
        return carry, self.run(f"{name}, stack", _stacked, tuple(outs))

    def average(self, name: str, one_pass: Callable, passes: int, args: tuple) -> tuple[Any, Any]:
        """Loops in Python, with a running sum."""
        if passes == 1:
            return one_pass(*args)
        total, samples = None, []
        for part in self.run(f"{name}, split", lambda *args: _unstacked(_parts(passes, args)), *args):
            value, sample = one_pass(*part)
            total = value if total is None else self.run(f"{name}, sum", _sum, total, value, donate=(0,))
            samples.append(sample)
        mean = self.run(f"{name}, mean", lambda total: _divided(passes, total), total, donate=(0,))
        joined = self.run(f"{name}, join", lambda samples: _joined(_stacked(samples)), tuple(samples))
        return mean, joined

    def compiled(self) -> dict[str, jax.stages.Compiled]:
        """Returns the programs by the names of their stages, once all are compiled."""
        return {name: future.result() for name, future in self._programs.items()}

    def _compile(self, name: str, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        start = time.monotonic()
        compiled = lowered.compile(compiler_options=self._options)
        logging.info("compiled %r in %.1f s", name, time.monotonic() - start)
        return compiled

    def _result(self, name: str, lowered: jax.stages.Lowered, out: Any) -> Any:
        """Returns the result's shapes; their shardings are asked of the program only where `out` leaves them free."""
        free = any(sharding is None for sharding in jax.tree.leaves(out, is_leaf=lambda s: s is None))
        if free:
            out = self._programs[name].result().output_shardings
        return _prefixed(
            lambda sharding, part: jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), part
            ),
            out,
            lowered.out_info,
        )


def _prefixed(function: Callable[[Any, Any], Any], prefix: Any, tree: Any) -> Any:
    """Returns the tree with `function(leaf of the prefix, subtree)` in place of each subtree; None changes nothing."""
    return jax.tree.map(
        lambda leaf, part: part if leaf is None else function(leaf, part),
        prefix,
        tree,
        is_leaf=lambda leaf: leaf is None,
    )


def _length(xs: Any) -> int:
    return jax.tree.leaves(xs)[0].shape[0]


def _unstacked(xs: Any) -> tuple[Any, ...]:
    return tuple(jax.tree.map(lambda a, i=i: a[i], xs) for i in range(_length(xs)))


def _stacked(parts: tuple[Any, ...]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def _parts(passes: int, args: tuple) -> tuple:
    return jax.tree.map(lambda a: a.reshape(a.shape[0] // passes, passes, *a.shape[1:]).swapaxes(0, 1), args)


def _joined(samples: Any) -> Any:
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:]), samples)


def _sum(total: Any, value: Any) -> Any:
    return jax.tree.map(jnp.add, total, value)


def _divided(passes: int, total: Any) -> Any:
    return jax.tree.map(lambda a: a / passes, total)
