"""A complete distillation in miniature: random networks of every kind that a step uses, without PyTorch."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sbv2_jax import lora, steps
from sbv2_jax.models.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel
from sbv2_jax.models.clip_image import preprocess
from sbv2_jax.models.network import Network
from sbv2_jax.models.tiny_vae import AutoencoderTiny, TinyVAEConfig
from sbv2_jax.models.unet import UNet2DConditionModel, UNetConfig
from sbv2_jax.models.vae import AutoencoderKL, VAEConfig
from sbv2_jax.schedule import ScheduleConfig, make_schedule
from sbv2_jax.state import Frozen
from sbv2_jax.tree import Params

BATCH, LATENTS, VOCABULARY, END, LENGTH = 4, (8, 8, 4), 40, 39, 7

UNET = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
    "use_linear_projection": True,
}
TEXT = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LENGTH,
    "bos_token_id": VOCABULARY - 2,
    "eos_token_id": END,
    "pad_token_id": END,
}
# Smaller than the decoders' pictures, so that the resize has to filter.
VISION = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "image_size": 12,
    "patch_size": 4,
}
CLIP = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 6}
TINY_VAE = {
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8],
    "num_encoder_blocks": [1, 1],
    "num_decoder_blocks": [1, 1],
}
KL_VAE = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# Other layers, ranks and strengths for each LoRA, so that none can stand in for the other.
STUDENT_LORA = {"targets": r".*\.attn[12]\.to_(q|k|v|out\.0)", "rank": 3, "alpha": 5.0}
SCORE_LORA = {"targets": r".*\.attn[12]\.to_(q|v)", "rank": 2, "alpha": 3.0}


def scale(settings: dict) -> float:
    """Returns the factor alpha / rank of a LoRA."""
    return settings["alpha"] / settings["rank"]


@functools.cache
def unet(lora_name: str | None = None) -> Network:
    """Returns the UNet, alone or with the LoRA named "student" or "score"."""

    def build(rngs: nnx.Rngs) -> nnx.Module:
        model = UNet2DConditionModel(UNetConfig.from_dict(UNET), rngs)
        if lora_name is None:
            return model
        settings = {"student": STUDENT_LORA, "score": SCORE_LORA}[lora_name]
        return lora.attach(model, settings["targets"], settings["rank"], rngs)

    return _compiled(Network(build))


@functools.cache
def networks() -> dict[str, Network]:
    """Returns every network but the UNet."""
    return {
        "text": _compiled(Network(lambda r: CLIPTextModel(CLIPTextConfig.from_dict(TEXT), r))),
        "clip": _compiled(Network(lambda r: CLIPModel(CLIPConfig.from_dict(CLIP), r))),
        "tiny": _compiled(Network(lambda r: AutoencoderTiny(TinyVAEConfig.from_dict(TINY_VAE), r))),
        "kl": _compiled(Network(lambda r: AutoencoderKL(VAEConfig.from_dict(KL_VAE), r))),
    }


def fast_jit(function: Callable) -> Callable:
    """Returns the function jitted to compile fast: these networks take milliseconds to run anyhow."""
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    return jax.jit(function, compiler_options=options)


def _compiled(network: Network) -> Network:
    # Stages that are called outside of jit then share each network's compiled forward and backward pass.
    network.apply = jax.jit(network.apply, static_argnames="method")
    return network


def random_params(network: Network, seed: int) -> Params:
    """Draws every parameter so that all of them matter: biases, scales and the LoRA's `up` as well."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        leaf = name.rpartition(".")[2]
        noise = rng.standard_normal(shape, np.float32)
        if leaf == "kernel":
            return noise * np.float32(np.prod(shape[:-1]) ** -0.5)
        return np.float32(0.3) * noise + np.float32(leaf == "scale")

    return {name: jnp.asarray(draw(name, shape.shape)) for name, shape in network.shapes.items()}


def token_ids(rng: np.random.Generator, batch: int) -> np.ndarray:
    """Returns random prompts that end at different places, padded with the end token."""
    ids = rng.integers(1, VOCABULARY - 2, (batch, LENGTH))
    for row, stop in enumerate(rng.integers(2, LENGTH, batch)):
        ids[row, stop:] = END
    return ids.astype(np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """What a step is called with, and the trained parameters to start from."""

    models: steps.Models
    frozen: Frozen
    student: Params
    score: Params
    batch: steps.Batch


def make_world(
    *,
    student: str = "full",
    student_prediction: str = "epsilon",
    teacher_prediction: str = "epsilon",
    decoder: str | None = None,
    batch: int = BATCH,
) -> World:
    """Returns a world whose student trains all weights ("full") or a "lora"; a decoder brings the CLIP loss.

    The student starts from other weights than the teacher's.
    """
    rng = np.random.default_rng(7)
    net = networks()
    text_params = random_params(net["text"], 1)
    empty = np.full((1, LENGTH), END, np.int32)
    student_unet = unet("student" if student == "lora" else None)
    student_base, student_lora = lora.split(random_params(student_unet, 2))
    teacher, score = lora.split(random_params(unet("score"), 3))
    models = steps.Models(
        student=student_unet,
        student_schedule=make_schedule(ScheduleConfig(**SCHEDULE, prediction_type=student_prediction)),
        score=unet("score"),
        score_schedule=make_schedule(ScheduleConfig(**SCHEDULE, prediction_type=teacher_prediction)),
        text_encoder=net["text"],
        **({} if decoder is None else _clip_loss(decoder)),
    )
    frozen = Frozen(
        teacher=teacher,
        student=student_base if student == "lora" else {},
        text_encoder=text_params,
        null_context=net["text"].apply(text_params, empty).last_hidden_state[0],
        decoder={} if decoder is None else random_params(net[decoder], 4),
        clip={} if decoder is None else random_params(net["clip"], 5),
    )
    return World(
        models=models,
        frozen=frozen,
        student=student_lora if student == "lora" else student_base,
        score=score,
        batch=steps.Batch(token_ids(rng, batch), None if decoder is None else token_ids(rng, batch)),
    )


def _clip_loss(decoder: str) -> dict[str, Callable]:
    net = networks()
    factor = {"tiny": 1.0, "kl": KL_VAE["scaling_factor"]}[decoder]
    size = VISION["image_size"]
    return {
        "decode": lambda p, x: net[decoder].apply(p, x / factor, method="decode"),
        "clip_image": lambda p, x: net["clip"].apply(p, preprocess(x, size), method="image_features"),
        "clip_text": lambda p, ids: net["clip"].apply(p, ids, method="text_features"),
    }
