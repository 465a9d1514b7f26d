"""Latents of real pictures: what `launch/latents.py` does."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sbv2_jax.checkpoint.manifest import json_digest
from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.data.latent_sets import FORMAT
from sbv2_jax.data.real_latents import RealLatents
from sbv2_jax.devices import processes
from sbv2_jax.errors import InputError
from sbv2_jax.evaluate.pictures import Folder
from sbv2_jax.fields import imported
from sbv2_jax.models.config import of_kind
from sbv2_jax.models.registry import network
from sbv2_jax.models.vae import VAEConfig
from sbv2_jax.run.components import Parts, latent_side, read_parts
from sbv2_jax.run.config import default_config
from sbv2_jax.run.latent_sets import OnEveryDevice, make_set, require_same
from sbv2_jax.run.sources import Files, sources_of

_NAMED = {"openmoji": "sbv2_jax.openmoji.world:Pictures"}


class CaptionedPictures(Protocol):
    """Pictures by number, each with its caption; `fingerprint` stands for their content."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> str: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        """Returns a picture, uint8 [H, W, 3], and its caption."""
        ...


class CaptionedFolder:
    """The pictures of a folder, each with its caption in the text file of its name: `cat.png` and `cat.txt`.

    Raises InputError for a folder without pictures, and where the caption of one is missing, blank or not UTF-8.
    """

    def __init__(self, directory: str | Path):
        self._folder = Folder(directory)
        self._captions = [_caption(path.with_suffix(".txt"), path) for path in self._folder.paths]

    def __len__(self) -> int:
        return len(self._folder)

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        return self._folder[index], self._captions[index]

    def fingerprint(self) -> str:
        """Returns one SHA-256 over the pictures and their captions."""
        return json_digest([self._folder.fingerprint(), self._captions])


def _caption(path: Path, picture: Path) -> str:
    try:
        text = " ".join(path.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{picture}: its caption, {path.name}, cannot be read: {error}") from error
    if not text:
        raise InputError(f"{picture}: its caption, {path.name}, is blank")
    return text


def open_pictures(name: str) -> CaptionedPictures:
    """Opens captioned pictures: a folder, "openmoji", or "package.module:NAME" or "file.py:NAME" of your own.

    Raises InputError for what is none of them.
    """
    if name in _NAMED or (":" in name and not Path(name).expanduser().exists()):
        return imported(_NAMED.get(name, name), "--pictures", name)()
    return CaptionedFolder(Path(name).expanduser())


def make_latents(
    model: str,
    pictures: str,
    out: str | Path,
    *,
    resolution: int = 0,
    count: int = 0,
    dtype: str,
    shard_size: int,
    batch_size: int,
) -> None:
    """Encodes the first `count` pictures, or all, and writes their latents to a directory, in shards with a manifest.

    A latent is the mean of the posterior of the model's autoencoder, scaled, of the square in the middle of the picture
    at the model's size. Shards, interruptions, processes and `batch_size` are as for `pairs.make_pairs`.
    Raises InputError for bad input, and for a directory of other settings, before anything is written.
    """
    config, out = default_config(), Path(out)
    config.update(teacher=model, resolution=resolution, terms=())
    with processes.ending_together():
        with processes.together():
            parts, source = read_parts(config), open_pictures(pictures)
            vae = of_kind(parts.vae.config, VAEConfig, str(parts.vae.directory))
            side = latent_side(config, parts)
            if not len(source):
                raise InputError(f"--pictures={pictures} has no pictures")
            if count > len(source):
                raise InputError(f"--count={count}: {pictures} has {len(source)} pictures")
            settings = {
                "format": FORMAT,
                "count": count or len(source),
                "dtype": dtype,
                "latent_shape": [side, side, vae.latent_channels],
                "shard_size": shard_size,
                "pictures": source.fingerprint(),
                "made_from": {"vae": sources_of(parts, Files(out))["vae"]["sha256"]},
            }
            require_same(out, RealLatents.THINGS, settings)
        processes.require_same("what the latents are made of", json.dumps(settings))
        make_set(
            *(out, RealLatents.THING, RealLatents.THINGS, settings),
            lambda: _Encoder(settings, parts, source, batch_size),
        )


class _Encoder:
    """Encodes pictures."""

    def __init__(
        self, settings: Mapping[str, Any], parts: Parts, pictures: CaptionedPictures, batch_size: int
    ):
        config = of_kind(parts.vae.config, VAEConfig, str(parts.vae.directory))
        vae, self._pictures = network(config), pictures
        self._side = settings["latent_shape"][0] * config.downsampling

        def encode(params: Any, rows: Mapping[str, jax.Array]) -> jax.Array:
            pixels = rows["pictures"].astype(jnp.float32) / 127.5 - 1.0
            mean, _ = vae.apply(params, pixels, method="encode")
            return (config.scaling_factor * mean).astype(settings["dtype"])

        self._encode = OnEveryDevice(encode, min(batch_size, settings["shard_size"], settings["count"]))
        self._params = self._encode.hold(load_component(parts.vae.files, dtype=jnp.float32).params)
        self.at_a_time = self._encode.at_a_time

    def make(self, numbers: range) -> tuple[np.ndarray, list[str]]:
        """Returns the latents of pictures, and their captions."""
        read = [self._pictures[number] for number in numbers]
        squares = np.stack([_square(picture, self._side) for picture, _ in read])
        return self._encode(self._params, {"pictures": squares}), [caption for _, caption in read]


def _square(picture: np.ndarray, side: int) -> np.ndarray:
    """Returns the square in the middle of a picture at another size, uint8 [side, side, 3]."""
    height, width, _ = picture.shape
    edge = min(height, width)
    if (height, width) == (side, side):
        return picture
    left, top = (width - edge) // 2, (height - edge) // 2
    middle = Image.fromarray(picture).crop((left, top, left + edge, top + edge))
    return np.asarray(middle.resize((side, side), Image.Resampling.LANCZOS))
