"""The networks in the order in which they build upon each other, each trained when it is first needed."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from sbv2_jax.convert.formats.component import Component
from sbv2_jax.convert.formats.pipeline import PipelineParts
from sbv2_jax.models.clip import CLIPConfig, CLIPTextConfig
from sbv2_jax.models.config import ModelConfig
from sbv2_jax.models.network import Network
from sbv2_jax.models.registry import network
from sbv2_jax.models.tiny_vae import TinyVAEConfig
from sbv2_jax.models.tokenizer import Tokenizer
from sbv2_jax.models.unet import UNetConfig
from sbv2_jax.models.vae import VAEConfig
from sbv2_jax.openmoji import world as openmoji
from sbv2_jax.openmoji.pretrain import clip, grids, unet, vae
from sbv2_jax.openmoji.pretrain.dataset import World, validation_pictures
from sbv2_jax.openmoji.pretrain.loop import Shared, Stage, digest, quiet_branches, train
from sbv2_jax.openmoji.pretrain.pictures import in_batches, to_float, to_uint8
from sbv2_jax.openmoji.render import RESOLUTION
from sbv2_jax.tree import Arrays

_HELD_OUT, _IN_GRID = 256, 32  # pictures of the figures, and how many of them a grid shows
_PROMPTS = {"seen": 16, "recombined": 8, "held_out": 8}


class Stages:
    """The networks of one run; `component` trains what is missing, and what that builds upon.

    `given` is the pipeline that the run goes on from, if any.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        world: World,
        tokenizer: Tokenizer,
        given: PipelineParts | None = None,
    ):
        self.config, self.workdir, self.world, self.tokenizer = config, workdir, world, tokenizer
        self._given = given
        self._shared = Shared(
            workdir=workdir,
            seed=config.seed,
            cooldown=config.cooldown,
            clip_norm=config.clip_norm,
            log_every=config.log_every,
            keep=config.keep,
        )
        self._text_print = digest(world.fingerprint, repr(tokenizer), str(config.tokenizer.to_dict()))

    def component(self, name: str) -> Component[ModelConfig]:
        """Returns the trained `vae`, `vae_tiny`, `text_encoder`, `clip` or `unet`."""
        return getattr(self, f"_{name}")

    def _from_given(self, name: str) -> Component | None:
        """Returns a network of the pipeline that the run goes on from, float32."""
        return self._given.component(name, dtype=np.float32) if self._given else None

    @functools.cached_property
    def _vae(self) -> Component[VAEConfig]:
        """The autoencoder, its decoder trained to the end."""
        settings, first, net = self.config.decoder, self._encoded, self._vae_net
        decoder, rest = vae.decoder_of(first.params)

        def preview(params: Arrays) -> None:
            self._write_vae_grid(self._reconstruct({**rest, **params}, self._validation[:_IN_GRID]))

        params = train(
            Stage(
                name="decoder",
                loss=vae.decoder_loss(net, settings, first.config.scaling_factor),
                init=lambda: decoder,
                inputs={
                    "pictures": self.world.pictures,
                    "latents": self._scaled_latents(),
                    "rest": rest,
                },
                settings=settings,
                preview=preview,
                fingerprint=digest(self.world.fingerprint, first.params),
            ),
            self._shared,
        )
        return Component(first.config, {**rest, **params})

    @functools.cached_property
    def _encoded(self) -> Component[VAEConfig]:
        """The autoencoder whose encoder is as it stays; `_latents` are its."""
        if given := self._from_given("vae"):
            self._latents = self._cached_means(given.params)
            return given
        settings, net = self.config.vae, self._vae_net

        def preview(params: Arrays) -> None:
            real = self._validation[:_IN_GRID]
            self._write_vae_grid(self._reconstruct(params, real))

        params = train(
            Stage(
                name="vae",
                loss=vae.vae_loss(net, settings),
                init=lambda: vae.init_vae(net, self.config.seed),
                inputs={"pictures": self.world.pictures},
                settings=settings,
                preview=preview,
                fingerprint=self.world.fingerprint,
            ),
            self._shared,
        )
        params, self._latents, factor = vae.standardise(params, self._cached_means(params))
        return Component(vae.vae_config(settings, RESOLUTION, scaling_factor=factor), params)

    def _scaled_latents(self) -> np.ndarray:
        """Returns the latents of all pictures as the UNet takes them, float32 [N, h, w, c]."""
        factor = self._encoded.config.scaling_factor  # trains the autoencoder, if that is still to do
        return self._latents * np.float32(factor)

    def _cached_means(self, params: Arrays) -> np.ndarray:
        path, name = self.workdir / "vae" / "latents.npz", digest(self.world.fingerprint, params)
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            with np.load(path) as stored:
                if str(stored["of"]) == name:
                    return stored["latents"]
        latents = in_batches(self._encode, params, self.world.pictures)
        scratch = path.with_suffix(".partial.npz")
        np.savez(scratch, latents=latents, of=name)
        scratch.replace(path)
        return latents

    @functools.cached_property
    def _vae_tiny(self) -> Component[TinyVAEConfig]:
        if given := self._from_given("vae_tiny"):
            return given
        settings, large, net = self.config.vae_tiny, self._vae, self._tiny_net
        row = self._reconstruct(large.params, self._validation[:_IN_GRID])

        def preview(params: Arrays) -> None:
            self._write_vae_grid(row, self._decode_small(params, self._validation[:_IN_GRID]))

        params = train(
            Stage(
                name="vae_tiny",
                loss=vae.tiny_loss(net, settings),
                init=lambda: quiet_branches(net.init(self.config.seed + 1)),
                inputs={"pictures": self.world.pictures, "latents": self._scaled_latents()},
                settings=settings,
                preview=preview,
                fingerprint=digest(self.world.fingerprint, large.params),
            ),
            self._shared,
        )
        return Component(vae.tiny_config(settings, large.config.latent_channels), params)

    @functools.cached_property
    def _clip_text(self) -> Component[CLIPTextConfig]:
        """The text tower of the first CLIP; the rest of that CLIP has done its work."""
        if given := self._from_given("text_encoder"):
            return given
        whole = self._train_clip("text_encoder", seed=self.config.seed + 2)
        return Component(whole.config.text_config, clip.text_tower(whole.params))

    @functools.cached_property
    def _clip(self) -> Component[CLIPConfig]:
        if given := self._from_given("clip"):
            return given
        return self._train_clip("clip", seed=self.config.seed + 3)

    def _train_clip(self, name: str, seed: int) -> Component[CLIPConfig]:
        settings = self.config[name]
        config = clip.clip_config(settings, self.tokenizer, RESOLUTION)
        net = network(config)
        params = train(
            Stage(
                name=name,
                loss=clip.clip_loss(net, settings, RESOLUTION),
                init=lambda: net.init(seed),
                inputs={"pictures": self.world.pictures, "ids": self._ids, **self.world.twins()},
                settings=settings,
                preview=lambda params: None,
                fingerprint=self._text_print,
            ),
            self._shared,
        )
        return Component(config, params)

    @functools.cached_property
    def _unet(self) -> Component[UNetConfig]:
        return Component(self._unet_config, unet.split(self._denoiser)[0])

    @functools.cached_property
    def _text_encoder(self) -> Component[CLIPTextConfig]:
        """The text tower as the training of the UNet leaves it."""
        return Component(self._clip_text.config, unet.split(self._denoiser)[1])

    @functools.cached_property
    def _denoiser(self) -> dict[str, np.ndarray]:
        """The joined parameters of the UNet and its text tower."""
        settings, large, text = self.config.unet, self._vae, self._clip_text
        net, given = network(self._unet_config), self._from_given("unet")
        return train(
            Stage(
                name="unet",
                loss=unet.unet_loss(net, network(text.config), settings),
                init=lambda: unet.join(
                    given.params if given else quiet_branches(net.init(self.config.seed + 4)), text.params
                ),
                inputs={
                    "latents": self._scaled_latents(),
                    "ids": self._ids,
                    "null": self.tokenizer.encode([""])[0],
                },
                settings=settings,
                preview=self._write_unet_grid,
                fingerprint=digest(self._text_print, large.params, text.params),
            ),
            self._shared,
        )

    @functools.cached_property
    def _unet_config(self) -> UNetConfig:
        if self._given:
            return self._given.unet
        side = RESOLUTION // self._vae.config.downsampling
        width = self._clip_text.config.hidden_size
        return unet.unet_config(self.config.unet, width, side, self.config.vae.channels)

    @functools.cached_property
    def _ids(self) -> np.ndarray:
        return self.world.token_ids(self.tokenizer)

    @functools.cached_property
    def _validation(self) -> np.ndarray:
        return validation_pictures(_HELD_OUT, self.config.seed)

    # The functions below are compiled once, however often pictures are wanted.

    @functools.cached_property
    def _vae_net(self) -> Network:
        return network(self._given.vae if self._given else vae.vae_config(self.config.vae, RESOLUTION))

    @functools.cached_property
    def _tiny_net(self) -> Network:
        if self._given:
            return network(self._given.configs["vae_tiny"])
        return network(vae.tiny_config(self.config.vae_tiny, self.config.vae.channels))

    @functools.cached_property
    def _encode(self) -> Callable:
        return jax.jit(lambda params, x: self._vae_net.apply(params, to_float(x), method="encode")[0])

    @functools.cached_property
    def _decode(self) -> Callable:
        return jax.jit(lambda params, latents: self._vae_net.apply(params, latents, method="decode"))

    @functools.cached_property
    def _decode_tiny(self) -> Callable:
        return jax.jit(lambda params, latents: self._tiny_net.apply(params, latents, method="decode"))

    @functools.cached_property
    def _sample(self) -> Callable:
        nets, null = (
            (network(self._unet_config), network(self._clip_text.config)),
            self.tokenizer.encode([""]),
        )
        return jax.jit(unet.sampler(*nets, null, self.config.unet))

    def _reconstruct(self, params: Arrays, pictures: np.ndarray) -> np.ndarray:
        """Returns uint8 pictures through the autoencoder, whose latents may be standardised or not."""
        latents = in_batches(self._encode, params, pictures)
        return to_uint8(in_batches(self._decode, params, latents))

    def _decode_small(self, params: Arrays, pictures: np.ndarray) -> np.ndarray:
        """Returns uint8 pictures, encoded by the autoencoder and decoded by the tiny one."""
        large = self._vae
        latents = in_batches(self._encode, large.params, pictures) * np.float32(large.config.scaling_factor)
        return to_uint8(in_batches(self._decode_tiny, params, latents))

    def _draw(self, params: Arrays, captions: list[str]) -> np.ndarray:
        """Returns one sample of joined parameters for each caption, uint8 [N, H, W, 3], from always the same noise."""
        large, rows = self._vae, (self.tokenizer.encode(captions), unet.noise(len(captions), self._latents))
        latents = in_batches(self._sample, params, rows)
        return to_uint8(in_batches(self._decode, large.params, latents / large.config.scaling_factor))

    def _write_vae_grid(self, *rows: np.ndarray) -> None:
        grids.write_rows(self.workdir / "grid_vae.png", self._validation[:_IN_GRID], *rows)

    def _write_unet_grid(self, params: Arrays) -> None:
        prompts = [
            one for kind, count in _PROMPTS.items() for one in openmoji.prompts(kind, count, "validation")
        ]
        captions = [one.caption for one in prompts]
        real = np.stack([one.reference() for one in prompts])
        path = self.workdir / "grid_unet.png"
        grids.write_captioned(path, captions, self._draw(params, captions), real)

    def figures(self) -> dict[str, str]:
        """Returns what the model card says of the result, measured on this run's own networks.

        Reconstructions are of drawings never trained on. The CLIP chooses among the captions of all `_HELD_OUT`
        seen prompts, for a real picture and for a sample.
        """
        judge = self._clip
        prompts = openmoji.prompts("seen", _HELD_OUT, "validation")
        captions = [one.caption for one in prompts]
        right = functools.partial(
            clip.accuracy, network(judge.config), judge.params, self.tokenizer.encode(captions), RESOLUTION
        )
        real = np.stack([one.reference() for one in prompts])
        pictures = self._validation
        return {
            "PSNR of the autoencoder": _psnr(self._reconstruct(self._vae.params, pictures), pictures),
            "PSNR of the tiny decoder": _psnr(self._decode_small(self._vae_tiny.params, pictures), pictures),
            f"CLIP finds the caption of a real picture among {_HELD_OUT}": f"{right(real):.1%}",
            f"CLIP finds the caption of a sample among {_HELD_OUT}": (
                f"{right(self._draw(self._denoiser, captions)):.1%}"
            ),
        }


def _psnr(pictures: np.ndarray, targets: np.ndarray) -> str:
    error = np.mean(np.square(pictures.astype(np.float64) - targets))
    return f"{10 * np.log10(255.0**2 / error):.1f} dB"
