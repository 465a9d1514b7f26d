"""The configuration of a pre-training: each field declared once, with its default for the OpenMoji world.

Nothing here imports jax: a bad field is an error before any device is touched.
"""

from typing import Any

from ml_collections import ConfigDict

from sbv2_jax.errors import InputError
from sbv2_jax.fields import Field, build, check_fields, number, text, whole

COMPONENTS = ("vae", "vae_tiny", "text_encoder", "clip", "unet")
STAGES = ("vae", "decoder", "vae_tiny", "text_encoder", "clip", "unet")


def _widths(value: Any) -> str | None:
    right = isinstance(value, tuple) and value and all(type(item) is int and item > 0 for item in value)
    return None if right else "a tuple of whole numbers >= 1"


def _training(
    *, steps: int, batch_size: int, lr: float, ema: float = 0.998, weight_decay: float = 0.0
) -> dict[str, Field]:
    """The fields of the training of every stage."""
    return {
        "steps": Field(steps, whole(1), "Updates."),
        "batch_size": Field(batch_size, whole(1), "Pictures of one update."),
        "lr": Field(lr, number(0, above=True), "Learning rate of Adam, between warm-up and cooldown."),
        "warmup": Field(100, whole(1), "Steps over which the learning rate rises from 0."),
        "weight_decay": Field(weight_decay, number(0), "Weight decay, of the kernels."),
        "ema": Field(ema, number(0, 1, below=True), "Decay of the averaged weights, which are the result."),
        "checkpoint_every": Field(250, whole(1), "Steps between checkpoints and pictures."),
    }


def _tower(name: str, width: int, layers: int, heads: int) -> dict[str, Field]:
    return {
        f"{name}_width": Field(width, whole(1), f"Width of the {name} tower."),
        f"{name}_layers": Field(layers, whole(1), f"Transformer layers of the {name} tower."),
        f"{name}_heads": Field(heads, whole(1), f"Attention heads of the {name} tower."),
    }


def _clip(*, patch: int, projection: int, twins: int) -> dict[str, Field]:
    return {
        "patch": Field(patch, whole(1), "Pixels a side of a patch that the vision tower takes as one token."),
        "projection": Field(projection, whole(1), "Numbers of an embedding that pictures and texts share."),
        "twins": Field(
            twins,
            whole(1),
            "Pictures of one drawing in a batch, which only background, size and place tell apart.",
        ),
    }


def _edges() -> Field:
    return Field(0.5, number(0), "Weight of the differences between neighbours, beside the pixels'.")


_VAE = _training(steps=3000, batch_size=16, lr=3e-3) | {
    # Stable Diffusion's 4 channels hold a drawing of 64 px in 256 numbers: its lines blur, small things vanish.
    "channels": Field(8, whole(1), "Channels of the latents."),
    "widths": Field((16, 32, 64, 128), _widths, "Channels at each resolution, from the pixels down."),
    "layers": Field(1, whole(1), "Residual blocks at each resolution."),
    "groups": Field(8, whole(1), "Groups of the norms; they divide every width."),
    "kl": Field(3e-4, number(0), "Weight of the mean KL divergence of a latent from the standard normal."),
    "edges": _edges(),
}
# The encoder is as it is by now: its latents are the UNet's. The decoder learns on, for a third of the cost of a step.
_DECODER = _training(steps=3000, batch_size=16, lr=1.5e-3) | {
    "noise": Field(
        0.1, number(0), "Largest deviation of the noise on the scaled latents that it learns from."
    ),
    "edges": _edges(),
}
_VAE_TINY = _training(steps=2000, batch_size=8, lr=3e-3) | {
    "width": Field(16, whole(1), "Channels everywhere."),
    "encoder_blocks": Field((1, 1, 1, 1), _widths, "Blocks of the encoder at each resolution."),
    "decoder_blocks": Field((2, 2, 2, 1), _widths, "Blocks of the decoder at each resolution."),
    "edges": _edges(),
}
# The CLIP whose text tower conditions the UNet, and is trained on with it; the other is for the clamped loss.
_TEXT_ENCODER = (
    _training(steps=800, batch_size=64, lr=1e-3, weight_decay=0.05)
    | _tower("text", 160, 4, 4)
    | _tower("vision", 192, 4, 4)
    | _clip(patch=16, projection=128, twins=2)
)
_CLIP = (
    _training(steps=600, batch_size=96, lr=1e-3, weight_decay=0.05)
    | _tower("text", 128, 3, 2)
    | _tower("vision", 128, 4, 4)
    | _clip(patch=8, projection=96, twins=4)
)
_UNET = _training(steps=5000, batch_size=64, lr=1.5e-3, ema=0.999) | {
    "widths": Field((96, 160), _widths, "Channels at each resolution, from the latents down."),
    "layers": Field(1, whole(1), "Blocks at each resolution."),
    "heads": Field(4, whole(1), "Attention heads."),
    "groups": Field(16, whole(1), "Groups of the norms; they divide every width."),
    "caption_dropout": Field(
        0.1, number(0, 1, below=True), "How often a picture is trained without its caption."
    ),
    "snr_limit": Field(20.0, number(0, above=True), "Gamma of min-SNR weighting."),
    "guidance": Field(3.0, number(0), "Classifier-free guidance of the sample grids."),
    "sample_steps": Field(25, whole(1, 1000), "Steps of the sample grids."),
}

# Sized for a CPU with two cores.
FIELDS: dict[str, Field] = {
    "init": Field(
        "",
        text(empty=True),
        "Pipeline to go on from, a directory or bundled: its decoder, UNet and text tower learn on, all else stays.",
    ),
    "seed": Field(0, whole(0, 2**32 - 1), "Of the pictures, the weights and every draw."),
    "pictures": Field(40_000, whole(1), "Pictures that are drawn once and read by every stage."),
    "phrasings": Field(4, whole(1), "Captions of one picture, of which a step draws one."),
    "cooldown": Field(
        0.2, number(0, 1), "Share of the steps, at the end, over which a learning rate falls to 0."
    ),
    "clip_norm": Field(
        1.0, number(0, above=True), "Largest global norm of a gradient, which is scaled down to it."
    ),
    "log_every": Field(10, whole(1), "Steps between lines of metrics.jsonl; a line holds their mean."),
    "keep": Field(2, whole(1), "Checkpoints kept of each stage."),
    "tokenizer.vocab_size": Field(
        2048, whole(514), "Tokens: bytes, their word ends, merges, and the two special ones."
    ),
    "tokenizer.max_length": Field(
        24, whole(3, 77), "Tokens of a prompt, start and end included; no caption has more."
    ),
    **{
        f"{stage}.{name}": field
        for stage, declared in zip(
            STAGES, (_VAE, _DECODER, _VAE_TINY, _TEXT_ENCODER, _CLIP, _UNET), strict=True
        )
        for name, field in declared.items()
    },
}


def default_config() -> ConfigDict:
    """Returns the pre-training of the bundled pipeline, locked."""
    return build(FIELDS)


def shrink(config: ConfigDict) -> None:
    """Shrinks a pre-training, in place, to a minute: a few pictures, tiny networks, a few steps each."""
    config.update(pictures=48, phrasings=2, log_every=1)
    config.tokenizer.vocab_size = 600
    for stage in STAGES:
        config[stage].update(steps=4, batch_size=4, warmup=2, checkpoint_every=2)
    config.vae.update(widths=(8, 8, 8, 8), groups=4)
    config.vae_tiny.update(width=8, encoder_blocks=(1, 1, 1, 1), decoder_blocks=(1, 1, 1, 1))
    for stage in ("text_encoder", "clip"):
        config[stage].update(text_width=16, text_layers=1, text_heads=2, projection=8, twins=2)
        config[stage].update(vision_width=16, vision_layers=1, vision_heads=2, patch=16)
    config.unet.update(widths=(8, 16), heads=2, groups=4, sample_steps=2)


def validate(config: ConfigDict) -> None:
    """Checks every field; raises InputError, naming it, for one that is unknown, missing or out of range."""
    check_fields(config, FIELDS)
    for stage in ("text_encoder", "clip"):
        group = config[stage]
        if group.batch_size % group.twins:
            raise InputError(
                f"config.{stage}.twins = {group.twins} must divide config.{stage}.batch_size = {group.batch_size}"
            )
