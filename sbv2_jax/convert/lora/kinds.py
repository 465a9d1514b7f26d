"""The kinds of update in LoRA files, each as what it adds to a layer's weight: LoRA, LoCon, LoHa, LoKr, DoRA."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from sbv2_jax.convert.formats.names import to_ours, to_torch
from sbv2_jax.models import lora

Tensors = Mapping[str, np.ndarray]


class LoCon(NamedTuple):
    """A convolution's update of three factors, `up @ mid @ down` over channels: those of kohya with `lora_mid`."""

    down: np.ndarray
    up: np.ndarray
    mid: np.ndarray

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], self.down.shape[1], *self.mid.shape[2:])

    def fits(self) -> bool:
        one = all(part.ndim == 4 and part.shape[2:] == (1, 1) for part in (self.down, self.up))
        return one and self.mid.ndim == 4 and self.mid.shape[:2] == (self.up.shape[1], self.down.shape[0])

    def delta(self) -> np.ndarray:
        down, up = self.down[:, :, 0, 0], self.up[:, :, 0, 0]
        return np.einsum("om,mrhw,ri->oihw", up, self.mid, down, optimize=True)


class LoHa(NamedTuple):
    """The elementwise product of two updates of low rank (FedPara, Hyeon-Woo et al., 2022)."""

    w1_a: np.ndarray
    w1_b: np.ndarray
    w2_a: np.ndarray
    w2_b: np.ndarray
    t1: np.ndarray | None = None
    t2: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return _product_shape(self.w1_a, self.w1_b, self.t1)

    def fits(self) -> bool:
        first, second = (self.w1_a, self.w1_b, self.t1), (self.w2_a, self.w2_b, self.t2)
        return _product_fits(*first) and _product_fits(*second) and self.shape == _product_shape(*second)

    def delta(self) -> np.ndarray:
        return _product(self.w1_a, self.w1_b, self.t1) * _product(self.w2_a, self.w2_b, self.t2)


class LoKr(NamedTuple):
    """The Kronecker product of two matrices, each whole or of low rank (Edalati et al., 2022; LyCORIS)."""

    w1: np.ndarray | None = None
    w1_a: np.ndarray | None = None
    w1_b: np.ndarray | None = None
    w2: np.ndarray | None = None
    w2_a: np.ndarray | None = None
    w2_b: np.ndarray | None = None
    t2: np.ndarray | None = None

    @property
    def rank(self) -> int | None:
        """None where both matrices are whole: their alpha is without meaning."""
        low = self.w1_b if self.w2_b is None else self.w2_b
        return None if low is None else low.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        first, second = self._shapes()
        return (first[0] * second[0], first[1] * second[1], *second[2:])

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        first = _product_shape(*_both(self.w1_a, self.w1_b), None) if self.w1 is None else self.w1.shape
        second = _product_shape(*_both(self.w2_a, self.w2_b), self.t2) if self.w2 is None else self.w2.shape
        return first, second

    def fits(self) -> bool:
        lows = ((self.w1, self.w1_a, self.w1_b, None), (self.w2, self.w2_a, self.w2_b, self.t2))
        for whole, a, b, core in lows:
            low = [one for one in (a, b, core) if one is not None]
            if whole is None and (a is None or b is None or not _product_fits(a, b, core)):
                return False
            if whole is not None and (low or whole.ndim not in (2, 4)):
                return False
        return (2 if self.w1 is None else self.w1.ndim) == 2

    def delta(self) -> np.ndarray:
        first = _product(*_both(self.w1_a, self.w1_b), None) if self.w1 is None else self.w1
        second = _product(*_both(self.w2_a, self.w2_b), self.t2) if self.w2 is None else self.w2
        return np.kron(first.reshape(*first.shape, *(1,) * (second.ndim - 2)), second)


Product = LoCon | LoHa | LoKr


def _both(a: np.ndarray | None, b: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the factors of a matrix that is not whole; raises ValueError where it does not fit."""
    if a is None or b is None:
        raise ValueError("a matrix of a LoKr is neither whole nor a product of two")
    return a, b


def _product_fits(a: np.ndarray, b: np.ndarray, core: np.ndarray | None) -> bool:
    if a.ndim != 2 or b.ndim != 2:
        return False
    if core is None:
        return a.shape[1] == b.shape[0]
    return core.ndim == 4 and core.shape[:2] == (a.shape[0], b.shape[0])


def _product_shape(a: np.ndarray, b: np.ndarray, core: np.ndarray | None) -> tuple[int, ...]:
    return (a.shape[0], b.shape[1]) if core is None else (a.shape[1], b.shape[1], *core.shape[2:])


def _product(a: np.ndarray, b: np.ndarray, core: np.ndarray | None) -> np.ndarray:
    return a @ b if core is None else np.einsum("ijhw,jr,ip->prhw", core, b, a, optimize=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Lora:
    """What a file adds to a network's layers, by the layer's path.

    `factors` hold plain LoRAs: `<layer>.lora.down.kernel` [in, r] and `<layer>.lora.up.kernel` [r, out], those of
    a convolution [h, w, in, r] and [1, 1, r, out]. `products` are updates of other kinds, in PyTorch's axes, and
    `scales` the strength of each: alpha / rank. `magnitudes` are DoRA's, [out, 1], or LyCORIS's [1, in].
    """

    factors: Tensors
    scales: Mapping[str, float]
    products: Mapping[str, Product] = dataclasses.field(default_factory=dict)
    magnitudes: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """The sorted paths of the layers."""
        return sorted(self.scales)

    @property
    def plain(self) -> bool:
        """Whether it holds plain LoRAs alone."""
        return not self.products and not self.magnitudes

    def shape(self, layer: str) -> tuple[int, ...]:
        """Returns the shape of a layer's update, in PyTorch's axes."""
        if layer in self.products:
            return self.products[layer].shape
        down, up = (self.factors[f"{layer}.lora.{part}.kernel"] for part in ("down", "up"))
        return (up.shape[-1], down.shape[-2], *down.shape[:-2])

    def fits(self, layer: str, shape: tuple[int, ...]) -> bool:
        """Whether a layer's update can be added to a kernel of this shape.

        A dense layer is a convolution of one pixel, and LyCORIS keeps a convolution's inputs and pixels as one axis.
        """
        update, kernel = self.shape(layer), torch_shape(shape)
        if math.prod(update) != math.prod(kernel) or update[0] != kernel[0]:
            return False
        one_pixel = math.prod(update[2:]) == math.prod(kernel[2:]) == 1
        return update == kernel or one_pixel or (layer in self.products and len(update) == 2)

    def delta(self, layer: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns what is added to a layer's kernel of this shape, in float32, at the file's own strength."""
        if layer in self.products:
            update = np.float32(self.scales[layer]) * self.products[layer].delta()
            return to_ours(".kernel", update.reshape(torch_shape(shape)))
        down, up = (self.factors[f"{layer}.lora.{part}.kernel"] for part in ("down", "up"))
        return np.asarray(lora.update(down, up, self.scales[layer])).reshape(shape)

    def magnified(self, layer: str, kernel: np.ndarray) -> np.ndarray:
        """Returns a changed kernel with DoRA's magnitudes in place of its own; without any, as it is.

        Source: DoRA (Liu et al., 2024), equation 5: m (W + B A) / |W + B A|, the norm over each output's weights.
        LyCORIS's first version has it over each input's, which the magnitudes' shape tells.
        """
        if layer not in self.magnitudes:
            return kernel
        weight, magnitude = to_torch(".kernel", kernel), self.magnitudes[layer]
        axes = tuple(axis for axis in range(weight.ndim) if axis != (0 if magnitude.shape[1] == 1 else 1))
        norm = np.sqrt((weight**2).sum(axes, keepdims=True))
        magnitude = magnitude.reshape(*magnitude.shape, *(1,) * (weight.ndim - 2))
        return to_ours(".kernel", magnitude * (weight / norm))


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a kernel in PyTorch's axes."""
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
