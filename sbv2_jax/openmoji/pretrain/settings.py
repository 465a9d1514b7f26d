"""The configuration of a pre-training: defaults for the OpenMoji world, and what each field may hold.

Nothing here imports jax: a bad field is an error before any device is touched.
"""

from typing import Any

from ml_collections import ConfigDict

from sbv2_jax.errors import InputError
from sbv2_jax.fields import Check, check_fields, number, whole

STAGES = ("vae", "vae_tiny", "text_encoder", "clip", "unet")


def _widths(value: Any) -> str | None:
    right = isinstance(value, tuple) and value and all(type(item) is int and item > 0 for item in value)
    return None if right else "a tuple of whole numbers >= 1"


_TRAINING: dict[str, Check] = {
    "steps": whole(1),
    "batch_size": whole(1),
    "lr": number(0, above=True),
    "warmup": whole(1),
    "weight_decay": number(0),
    "ema": number(0, 1, below=True),
    "checkpoint_every": whole(1),
}
_CLIP: dict[str, Check] = {
    **{
        f"{tower}_{field}": whole(1) for tower in ("text", "vision") for field in ("width", "layers", "heads")
    },
    "patch": whole(1),
    "projection": whole(1),
    "twins": whole(1),
}
_MODEL: dict[str, dict[str, Check]] = {
    "vae": {
        "channels": whole(1),
        "widths": _widths,
        "layers": whole(1),
        "groups": whole(1),
        "kl": number(0),
        "edges": number(0),
    },
    "vae_tiny": {"width": whole(1), "encoder_blocks": _widths, "decoder_blocks": _widths, "edges": number(0)},
    "text_encoder": _CLIP,
    "clip": _CLIP,
    "unet": {
        "widths": _widths,
        "layers": whole(1),
        "heads": whole(1),
        "groups": whole(1),
        "caption_dropout": number(0, 1, below=True),
        "snr_limit": number(0, above=True),
        "guidance": number(0),
        "sample_steps": whole(1, 1000),
    },
}
FIELDS: dict[str, Check] = {
    "seed": whole(0, 2**32 - 1),
    "pictures": whole(1),
    "phrasings": whole(1),
    "cooldown": number(0, 1),
    "clip_norm": number(0, above=True),
    "log_every": whole(1),
    "keep": whole(1),
    "tokenizer.vocab_size": whole(514),
    "tokenizer.max_length": whole(3, 77),
    **{f"{stage}.{name}": check for stage in STAGES for name, check in (_TRAINING | _MODEL[stage]).items()},
}


def default_config() -> ConfigDict:
    """Returns the pre-training of the bundled pipeline, locked; sized for a CPU with two cores."""
    config = ConfigDict()
    config.seed = 0  # of the pictures, the weights and every draw
    config.pictures = 40_000  # drawn once, read by every stage
    config.phrasings = 4  # captions of one picture, of which a step draws one
    config.cooldown = 0.2  # the share of the steps, at the end, over which a learning rate falls to 0
    config.clip_norm = 1.0  # of the global gradient norm
    config.log_every = 10  # steps between lines of metrics.jsonl; a line holds their mean
    config.keep = 2  # checkpoints of each stage

    config.tokenizer = ConfigDict()
    config.tokenizer.vocab_size = 2048  # bytes, their word ends, merges, and the two special tokens
    config.tokenizer.max_length = 24  # tokens of a prompt, start and end included; no caption has more

    config.vae = _training(steps=2000, batch_size=8, lr=3e-3, ema=0.998)
    # Stable Diffusion's 4 channels hold a drawing of 64 px in 256 numbers: its lines blur, small things vanish.
    config.vae.channels = 8
    config.vae.widths = (16, 32, 64, 128)
    config.vae.layers = 1
    config.vae.groups = 8
    config.vae.kl = 3e-4  # weight of the mean KL divergence of a latent from the standard normal
    config.vae.edges = 0.5  # weight of the differences between neighbours, beside the pixels'

    config.vae_tiny = _training(steps=2000, batch_size=8, lr=3e-3, ema=0.998)
    config.vae_tiny.width = 16
    config.vae_tiny.encoder_blocks = (1, 1, 1, 1)
    config.vae_tiny.decoder_blocks = (2, 2, 2, 1)
    config.vae_tiny.edges = 0.5

    # The CLIP whose text tower conditions the UNet, and is trained on with it; the other is for the clamped loss.
    config.text_encoder = _training(steps=800, batch_size=64, lr=1e-3, ema=0.998, weight_decay=0.05)
    config.text_encoder.update(text_width=160, text_layers=4, text_heads=4, projection=128, twins=2)
    config.text_encoder.update(vision_width=192, vision_layers=4, vision_heads=4, patch=16)

    config.clip = _training(steps=600, batch_size=96, lr=1e-3, ema=0.998, weight_decay=0.05)
    config.clip.update(text_width=128, text_layers=3, text_heads=2, projection=96, twins=4)
    config.clip.update(vision_width=128, vision_layers=4, vision_heads=4, patch=8)

    config.unet = _training(steps=5000, batch_size=64, lr=1.5e-3, ema=0.999, checkpoint_every=250)
    config.unet.widths = (96, 160)
    config.unet.layers = 1
    config.unet.heads = 4
    config.unet.groups = 16
    config.unet.caption_dropout = 0.1
    config.unet.snr_limit = 5.0  # gamma of min-SNR weighting
    config.unet.guidance = 3.0  # of the sample grids
    config.unet.sample_steps = 25
    return config.lock()


def _training(
    *,
    steps: int,
    batch_size: int,
    lr: float,
    ema: float,
    weight_decay: float = 0.0,
    checkpoint_every: int = 250,
) -> ConfigDict:
    """Returns the fields that every trained stage has, unlocked."""
    group = ConfigDict()
    group.steps = steps
    group.batch_size = batch_size
    group.lr = lr
    group.warmup = 100  # steps over which the learning rate rises from 0
    group.weight_decay = weight_decay  # of the kernels
    group.ema = ema  # decay of the averaged weights, which are the result
    group.checkpoint_every = checkpoint_every  # steps between checkpoints and pictures
    return group


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
