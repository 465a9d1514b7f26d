"""Pictures and captions in the eyes of one CLIP, which every figure must name."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sbv2_jax.convert import openclip
from sbv2_jax.convert.formats.component import Component, load_component
from sbv2_jax.convert.formats.files import file_of, read_json
from sbv2_jax.convert.formats.resolve import resolve
from sbv2_jax.convert.formats.side_files import PREPROCESSOR
from sbv2_jax.errors import InputError
from sbv2_jax.evaluate import resize
from sbv2_jax.evaluate.extractors.extractor import Extractor, Resize
from sbv2_jax.evaluate.extractors.networks import normalised
from sbv2_jax.evaluate.extractors.program import PER_DEVICE, Program, check_pictures, fingerprint
from sbv2_jax.models.clip import CLIPConfig
from sbv2_jax.models.clip_image import CLIPImageConfig
from sbv2_jax.models.registry import network
from sbv2_jax.models.tokenizer import Tokenizer, load_fitting
from sbv2_jax.tree import Params

Pairs = tuple[np.ndarray, Sequence[str]]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ImageText:
    """A CLIP with its preprocessing, from pictures and captions to their cosines; the fields are those of Extractor."""

    fingerprint: str
    resize: Resize
    side: int
    tokenizer: Tokenizer
    program: Program

    def similarity(self, pictures: np.ndarray, captions: Sequence[str], *, prefix: str = "") -> np.ndarray:
        """Returns the cosine of every picture and its caption, float64 [N] (Hessel et al., 2021, section 3).

        The raw cosine: neither weighted by 2.5 nor clipped at 0. `pictures` are uint8 [N, H, W, 3]; `prefix` stands
        before every caption. Raises ValueError for other arrays, and where the numbers differ.
        """
        parts = list(self.stream([(pictures, captions)], prefix=prefix))
        return np.concatenate([np.zeros(0), *parts])

    def stream(self, batches: Iterable[Pairs], *, prefix: str = "") -> Iterator[np.ndarray]:
        """Yields what `similarity` returns, in the pictures' order and in pieces of the program's size."""

        def prepare(pair: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, ...]:
            return self.resize(pair[0], self.side), pair[1]

        for rows in self.program.stream(prepare, self._pairs(batches, prefix)):
            yield rows["cosine"].astype(np.float64)

    def _pairs(self, batches: Iterable[Pairs], prefix: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for pictures, captions in batches:
            check_pictures(pictures)
            yield from zip(
                pictures, self.tokenizer.encode([prefix + caption for caption in captions]), strict=True
            )


def image_text(
    clip: Component[CLIPConfig],
    tokenizer: Tokenizer,
    image: CLIPImageConfig,
    *,
    resized: Resize = resize.bicubic_then_crop,
    per_device: int = PER_DEVICE,
) -> ImageText:
    """Returns the `ImageText` of a CLIPModel with its tokenizer; `image` says how it takes pictures."""
    net = network(clip.config)

    def compare(params: Params, pictures: jax.Array, ids: jax.Array) -> dict[str, jax.Array]:
        seen = net.apply(params, _pixels(pictures, image), method="image_features")
        said = net.apply(params, ids, method="text_features")
        return {"cosine": (_unit(seen) * _unit(said)).sum(-1)}

    return ImageText(
        fingerprint=_fingerprint(clip, image, resized),
        resize=resized,
        side=image.size,
        tokenizer=tokenizer,
        program=Program(compare, clip.params, per_device=per_device),
    )


def open_image_text(
    path: str | Path,
    *,
    weights: str | Path | None = None,
    resized: Resize = resize.bicubic_then_crop,
    per_device: int = PER_DEVICE,
) -> ImageText:
    """Opens a CLIP for `ImageText`: a directory, or a hub id, in the layout of transformers or of OpenCLIP.

    `weights` is a file of other weights for one of OpenCLIP's, of safetensors or of torch.save: HPSv2 is
    `HPS_v2_compressed.pt` for the ViT-H-14, with `resize.bicubic_then_pad`. Raises InputError as `load_component`,
    `openclip.load` and `load_fitting` do.
    """
    directory, clip, image = _open(path, weights)
    tokenizer = load_fitting(directory, clip.config.text_config)
    return image_text(clip, tokenizer, image, resized=resized, per_device=per_device)


def open_clip(
    path: str | Path, *, weights: str | Path | None = None, per_device: int = PER_DEVICE
) -> Extractor:
    """Opens a CLIP's image tower: "features" [N, D] of length 1, as CMMD takes them (Jayasumana et al., 2024).

    `path` and `weights` are those of `open_image_text`; OpenAI's ViT-L/14 for 336 px is that of the published
    figures. Pictures are cropped to their centre square, then resized, bicubic in uint8.
    """
    _, clip, image = _open(path, weights)
    net = network(clip.config)
    resized = resize.crop_then_bicubic

    def extract(params: Params, pictures: jax.Array) -> dict[str, jax.Array]:
        return {"features": _unit(net.apply(params, _pixels(pictures, image), method="image_features"))}

    return Extractor(
        name="clip",
        fingerprint=_fingerprint(clip, image, resized),
        resize=resized,
        side=image.size,
        program=Program(extract, clip.params, per_device=per_device),
    )


def _open(
    path: str | Path, weights: str | Path | None
) -> tuple[Path, Component[CLIPConfig], CLIPImageConfig]:
    directory = _directory(path, weights)
    if weights is not None or _has_openclip(directory):
        return directory, *openclip.load(directory, weights=weights)
    found = load_component(directory)
    if not isinstance(found.config, CLIPConfig):
        raise InputError(f"{directory} holds a {type(found.config).__name__}, a whole CLIP is expected")
    preprocessor = file_of(directory, PREPROCESSOR)
    clip = Component(found.config, found.params)
    return directory, clip, CLIPImageConfig.from_dict(read_json(preprocessor), str(preprocessor))


def _directory(path: str | Path, weights: str | Path | None) -> Path:
    if weights is not None:
        return openclip.find(path, weights)
    # a hub repository often holds the same weights for both libraries: one of them is fetched
    directory = resolve(path, stems=())
    if (directory / openclip.CONFIG).exists():
        directory = openclip.find(path)
    return directory if _has_openclip(directory) else resolve(path, stems=("model",))


def _has_openclip(directory: Path) -> bool:
    return (directory / openclip.CONFIG).exists() and any(directory.glob(f"{openclip.STEM}*.safetensors"))


def _fingerprint(clip: Component[CLIPConfig], image: CLIPImageConfig, resized: Resize) -> str:
    return fingerprint(clip.params, clip.config.to_dict(), image.to_dict(), resized.__name__)


def _pixels(pictures: jax.Array, image: CLIPImageConfig) -> jax.Array:
    return normalised(pictures, image.image_mean, image.image_std)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
