"""Inception V3 (Szegedy et al., 2015) as the graph of 2015 computes it that FID and the Inception score are defined by.

It differs from the network of the paper in its pooled branches: averages leave out the pixels of the padding, and the
last block takes a maximum (pytorch-fid, inception.py). The names are those of torchvision, which pytorch-fid and
torch-fidelity keep.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from sbv2_jax.models.config import ModelConfig
from sbv2_jax.models.layers import BatchNorm, Conv, Linear
from sbv2_jax.models.module import Module

SIDE = 299
# of pt_inception-2015-12-05-6726825d.pth: torch's names of files end in the first eight digits of their SHA-256
_PUBLISHED = "6726825d"
_EPSILON = 0.001


@dataclasses.dataclass(frozen=True, kw_only=True)
class InceptionConfig(ModelConfig):
    """The fields of an `InceptionV3`'s `config.json`: `num_classes` is 1008 in the graph of 2015.

    `converted_from` is the SHA-256 of the file that the weights were converted from.
    """

    CLASS_NAME: ClassVar[str] = "InceptionV3"
    STEM: ClassVar[str] = "model"

    num_classes: int = 1008
    converted_from: str | None = None

    @property
    def is_published(self) -> bool:
        """Whether the weights are those that FID is defined by, which their file's name gives the start of."""
        return (self.converted_from or "").startswith(_PUBLISHED)


class BasicConv2d(Module):
    """A convolution, its normalisation, and max(0, x)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int] = 1,
        *,
        stride: int = 1,
        padding: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(
            in_channels, out_channels, kernel, stride=stride, padding=padding, use_bias=False, rngs=rngs
        )
        self.bn = BatchNorm(out_channels, _EPSILON)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(self.bn(self.conv(x)))


class InceptionA(Module):
    """Kernels of 1, 5 and twice 3, and an average, over 35 x 35."""

    def __init__(self, channels: int, pool_features: int, rngs: nnx.Rngs):
        self.branch1x1 = BasicConv2d(channels, 64, rngs=rngs)
        self.branch5x5_1 = BasicConv2d(channels, 48, rngs=rngs)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, rngs=rngs)
        self.branch3x3dbl_1 = BasicConv2d(channels, 64, rngs=rngs)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, rngs=rngs)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, rngs=rngs)
        self.branch_pool = BasicConv2d(channels, pool_features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return _joined(self.branch1x1(x), five, three, self.branch_pool(_average(x)))


class InceptionB(Module):
    """From 35 x 35 to 17 x 17."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.branch3x3 = BasicConv2d(channels, 384, 3, stride=2, padding=0, rngs=rngs)
        self.branch3x3dbl_1 = BasicConv2d(channels, 64, rngs=rngs)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, rngs=rngs)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2, padding=0, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return _joined(self.branch3x3(x), three, _halved(x))


class InceptionC(Module):
    """Kernels of 7 as pairs of 1 x 7 and 7 x 1, over 17 x 17."""

    def __init__(self, channels: int, inner: int, rngs: nnx.Rngs):
        self.branch1x1 = BasicConv2d(channels, 192, rngs=rngs)
        self.branch7x7_1 = BasicConv2d(channels, inner, rngs=rngs)
        self.branch7x7_2 = BasicConv2d(inner, inner, (1, 7), rngs=rngs)
        self.branch7x7_3 = BasicConv2d(inner, 192, (7, 1), rngs=rngs)
        self.branch7x7dbl_1 = BasicConv2d(channels, inner, rngs=rngs)
        self.branch7x7dbl_2 = BasicConv2d(inner, inner, (7, 1), rngs=rngs)
        self.branch7x7dbl_3 = BasicConv2d(inner, inner, (1, 7), rngs=rngs)
        self.branch7x7dbl_4 = BasicConv2d(inner, inner, (7, 1), rngs=rngs)
        self.branch7x7dbl_5 = BasicConv2d(inner, 192, (1, 7), rngs=rngs)
        self.branch_pool = BasicConv2d(channels, 192, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return _joined(self.branch1x1(x), seven, twice, self.branch_pool(_average(x)))


class InceptionD(Module):
    """From 17 x 17 to 8 x 8."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.branch3x3_1 = BasicConv2d(channels, 192, rngs=rngs)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2, padding=0, rngs=rngs)
        self.branch7x7x3_1 = BasicConv2d(channels, 192, rngs=rngs)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), rngs=rngs)
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), rngs=rngs)
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2, padding=0, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return _joined(three, self.branch7x7x3_4(seven), _halved(x))


class InceptionE(Module):
    """Kernels of 3 as 1 x 3 beside 3 x 1, over 8 x 8; the pooled branch averages, or with `maximum` does not."""

    def __init__(self, channels: int, maximum: bool, rngs: nnx.Rngs):
        self.maximum = maximum
        self.branch1x1 = BasicConv2d(channels, 320, rngs=rngs)
        self.branch3x3_1 = BasicConv2d(channels, 384, rngs=rngs)
        self.branch3x3_2a = BasicConv2d(384, 384, (1, 3), rngs=rngs)
        self.branch3x3_2b = BasicConv2d(384, 384, (3, 1), rngs=rngs)
        self.branch3x3dbl_1 = BasicConv2d(channels, 448, rngs=rngs)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, rngs=rngs)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, (1, 3), rngs=rngs)
        self.branch3x3dbl_3b = BasicConv2d(384, 384, (3, 1), rngs=rngs)
        self.branch_pool = BasicConv2d(channels, 192, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        three = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = nnx.max_pool(x, (3, 3), strides=(1, 1), padding="SAME") if self.maximum else _average(x)
        return _joined(
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(twice),
            self.branch3x3dbl_3b(twice),
            self.branch_pool(pooled),
        )


class InceptionV3(Module):
    """FID's network: pictures [B, 299, 299, 3] of 0 to 255 to the features and logits that the metrics take."""

    def __init__(self, config: InceptionConfig, rngs: nnx.Rngs):
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2, padding=0, rngs=rngs)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3, padding=0, rngs=rngs)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, rngs=rngs)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, rngs=rngs)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3, padding=0, rngs=rngs)
        self.Mixed_5b = InceptionA(192, 32, rngs)
        self.Mixed_5c = InceptionA(256, 64, rngs)
        self.Mixed_5d = InceptionA(288, 64, rngs)
        self.Mixed_6a = InceptionB(288, rngs)
        self.Mixed_6b = InceptionC(768, 128, rngs)
        self.Mixed_6c = InceptionC(768, 160, rngs)
        self.Mixed_6d = InceptionC(768, 160, rngs)
        self.Mixed_6e = InceptionC(768, 192, rngs)
        self.Mixed_7a = InceptionD(768, rngs)
        self.Mixed_7b = InceptionE(1280, False, rngs)
        self.Mixed_7c = InceptionE(2048, True, rngs)
        self.fc = Linear(2048, config.num_classes, rngs=rngs)

    def __call__(self, pictures: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the last pooling [B, 2048] and the logits [B, num_classes] without their bias.

        The Inception score is defined by the softmax of the latter (Salimans et al., 2016, their code;
        "logits_unbiased" in torch-fidelity).
        """
        x = (pictures - 128.0) / 128.0
        x = _halved(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = _halved(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6a(x)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        features = x.mean((1, 2))
        return features, features @ self.fc.kernel.get_value()


def _joined(*branches: jax.Array) -> jax.Array:
    return jnp.concatenate(branches, axis=-1)


def _average(x: jax.Array) -> jax.Array:
    return nnx.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False)


def _halved(x: jax.Array) -> jax.Array:
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding="VALID")
