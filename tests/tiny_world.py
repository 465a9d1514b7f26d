"""A complete distillation in miniature: random networks of every kind that a step uses, without PyTorch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sbv2_jax.data.rows import spread
from sbv2_jax.diffusion.schedule import ScheduleConfig
from sbv2_jax.distill.gradients import FRESH, Batch
from sbv2_jax.distill.method import Method
from sbv2_jax.distill.state import Frozen, TrainState, init_state
from sbv2_jax.models import lora
from sbv2_jax.models.clip import CLIPConfig, CLIPTextConfig
from sbv2_jax.models.clip_image import CLIPImageConfig
from sbv2_jax.models.network import Network
from sbv2_jax.models.part import Part
from sbv2_jax.models.registry import network
from sbv2_jax.models.tiny_vae import TinyVAEConfig
from sbv2_jax.models.unet import UNetConfig
from sbv2_jax.models.vae import VAEConfig
from sbv2_jax.run.build import Run, assemble
from sbv2_jax.run.components import Parts
from sbv2_jax.run.config import default_config
from sbv2_jax.tree import Params

BATCH, LATENTS, VOCABULARY, END, LENGTH = 4, (8, 8, 4), 40, 39, 7
EMPTY = np.full((1, LENGTH), END, np.int32)  # the null prompt
EMPTY_XL = np.stack([EMPTY, np.where(np.arange(LENGTH)[None] < 2, END, 0)], axis=1).astype(np.int32)

UNET = {
    "sample_size": LATENTS[0],
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
    "use_linear_projection": True,
}
# The least that has attention, and goes down and up: what trains it compiles in a quarter of the time.
ONE_LEVEL = {
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "mid_block_type": None,
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
# SDXL: a second tower, of another width and depth and with a projection; the UNet takes both and six sizes.
TEXT_2 = TEXT | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "hidden_act": "gelu",
    "projection_dim": 10,
}
UNET_XL = UNET | {
    "cross_attention_dim": TEXT["hidden_size"] + TEXT_2["hidden_size"],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": TEXT_2["projection_dim"] + 6 * 6,
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

# The LoRAs have other layers, ranks and strengths, so that none can stand in for the other.
CONFIG = {
    "steps": 10,
    "batch_size": BATCH,
    "seed": 3,
    "student.lora.rank": 3,
    "student.lora.alpha": 5.0,
    "score.rank": 2,
    "score.alpha": 3.0,
    "score.targets": r".*\.attn[12]\.to_(q|v)",
    "score.null_prompt_probability": 0.5,  # of four prompts some are dropped and some are not
    "ema": 0.7,
}


def random_params(model: Network, seed: int) -> Params:
    """Draws every parameter so that all of them matter: biases, scales and the LoRA's `up` as well."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        leaf = name.rpartition(".")[2]
        noise = rng.standard_normal(shape, np.float32)
        if leaf == "kernel":
            return noise * np.float32(np.prod(shape[:-1]) ** -0.5)
        return np.float32(0.3) * noise + np.float32(leaf == "scale")

    return {name: jnp.asarray(draw(name, shape.shape)) for name, shape in model.shapes.items()}


def token_ids(rng: np.random.Generator, batch: int) -> np.ndarray:
    """Returns random prompts that end at different places, padded with the end token."""
    ids = rng.integers(1, VOCABULARY - 2, (batch, LENGTH))
    for row, stop in enumerate(rng.integers(2, LENGTH, batch)):
        ids[row, stop:] = END
    return ids.astype(np.int32)


def pair_columns(rng: np.random.Generator, run: Run, batch: int) -> Batch:
    """Returns the columns of pairs of random numbers and latents, in as many rows as the run has."""
    columns = {
        "pair_numbers": np.full(batch, -1, np.int32),
        "pair_seeds": np.zeros(batch, np.uint32),
        "pair_latents": np.zeros((batch, *run.method.latent_shape), np.float32),
    }
    rows = spread(run.method.rows["regression"].count, range(batch))
    columns["pair_numbers"][rows] = rng.integers(0, 1000, len(rows))
    columns["pair_seeds"][rows] = 17
    columns["pair_latents"][rows] = rng.standard_normal((len(rows), *run.method.latent_shape), np.float32)
    return columns


def real_columns(rng: np.random.Generator, run: Run, batch: int) -> Batch:
    """Returns the columns of real latents that are random numbers, in as many rows as the run has."""
    there = np.isin(np.arange(batch), spread(run.method.rows["gan"].count, range(batch)))
    latents = rng.standard_normal((batch, *run.method.latent_shape), np.float32)
    return {"real": there, "real_latents": np.where(there[:, None, None, None], latents, np.float32(0))}


def of_both(ids: np.ndarray) -> np.ndarray:
    """Returns SDXL's ids of the same prompts: the second tokenizer pads with 0."""
    ended = np.cumsum(ids == END, axis=1) > 1
    return np.stack([ids, np.where(ended, 0, ids)], axis=1).astype(np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """A run as `assemble` makes it, and what its step is called with."""

    config: ConfigDict
    run: Run
    frozen: Frozen
    student: Params
    score: Params
    batch: Batch
    discriminator: Params

    @property
    def empty(self) -> np.ndarray:
        """The token ids of the null prompt, [1, S] or [1, 2, S]."""
        return EMPTY if self.run.parts.text_encoder_2 is None else EMPTY_XL

    def init(self, method: Method | None = None) -> TrainState:
        """Returns the state at step 0, for the run's method unless another is given."""
        optimizers = (method or self.run.method).optimizers
        params = {"student": self.student, "score": self.score, "discriminator": self.discriminator}
        params = {name: params[name] for name in optimizers}
        return init_state(self.run.seed, params, optimizers, ema=self.config.ema > 0)


def make_world(
    changes: dict[str, Any] | None = None,
    *,
    student_prediction: str = "epsilon",
    teacher_prediction: str = "epsilon",
    unet: dict = UNET,
    xl: bool = False,
    zero_null: bool = True,
) -> World:
    """Returns a world whose configuration is CONFIG with these changes, all weights drawn at random.

    The student starts from other weights than the teacher's. A `clip.weight` brings the CLIP loss, a `reward.weight`
    the reward's, of the same CLIP where both are there, the term "regression" pairs whose latents are drawn at random,
    "gan" such real latents. With `xl` the world is one of SDXL, with UNET_XL, whose null condition is zeros if
    `zero_null`.
    """
    config = default_config()
    config.update_from_flattened_dict(CONFIG | (changes or {}))
    parts = _parts(config, UNET_XL if xl else unet, student_prediction, teacher_prediction)
    if xl:
        second = Part(config=CLIPTextConfig.from_dict(TEXT_2), directory=None)
        parts = dataclasses.replace(parts, text_encoder_2=second, zero_null=zero_null)
    run = assemble(config, parts)
    players, text_encoder = run.method.players, run.method.text_encoder
    student_base, student_lora = lora.base_and_factors(random_params(players["student"].network, 2))
    follows = players["score"].network if "score" in players else network(parts.teacher.config)
    teacher, score = lora.base_and_factors(random_params(follows, 3))
    text_params = random_params(text_encoder, 1)
    latents = run.method.latent_shape
    empty = EMPTY_XL[0] if xl else EMPTY[0]
    null_text = jax.jit(lambda params: text_encoder.null(params, empty, latents))(text_params)
    frozen = {"teacher": teacher, "text_encoder": text_params, "null_text": null_text}
    frozen |= {"student": student_base} if run.lora_student else {}
    for name, seed in {"decoder": 4, "clip": 5, "reward": 5}.items():
        if name in parts.networks:
            frozen[name] = random_params(network(parts.networks[name].config), seed)
    rng = np.random.default_rng(7)
    ids, clip_ids = token_ids(rng, config.batch_size), token_ids(rng, config.batch_size)
    if xl:
        ids = of_both(ids)
    fresh = {}
    if (further := run.method.updates - 1) > 0:
        of_updates = [token_ids(rng, config.batch_size) for _ in range(further)]
        fresh[FRESH] = np.stack([of_both(ids) if xl else ids for ids in of_updates])
    pairs = pair_columns(rng, run, config.batch_size) if "regression" in config.terms else {}
    real = real_columns(rng, run, config.batch_size) if "gan" in config.terms else {}
    return World(
        config=config,
        run=run,
        frozen=frozen,
        student=student_lora if run.lora_student else student_base,
        score=score,
        batch={"input_ids": ids} | dict.fromkeys(run.method.columns, clip_ids) | fresh | pairs | real,
        discriminator=random_params(players["discriminator"].network, 6)
        if "discriminator" in players
        else {},
    )


def _parts(config: ConfigDict, unet: dict, student_prediction: str, teacher_prediction: str) -> Parts:
    def part(config_class: type, values: dict) -> Part:
        return Part(config=config_class.from_dict(values), directory=None)

    vae, tiny = part(VAEConfig, KL_VAE), part(TinyVAEConfig, TINY_VAE)
    networks, side = {}, VISION["image_size"]
    for name in ("clip", "reward"):
        if config[name].weight > 0:
            config[name].model = "drawn at random"
            image = CLIPImageConfig(size=side, crop_size=side)
            networks["decoder"] = {"vae": vae, "vae_tiny": tiny}[config.clip.decoder]
            networks[name] = dataclasses.replace(part(CLIPConfig, CLIP), image=image)
    return Parts(
        teacher=part(UNetConfig, unet),
        teacher_schedule=ScheduleConfig(**SCHEDULE, prediction_type=teacher_prediction),
        student=part(UNetConfig, unet),
        student_schedule=ScheduleConfig(**SCHEDULE, prediction_type=student_prediction),
        text_encoder=part(CLIPTextConfig, TEXT),
        vae=vae,
        networks=networks,
        pipeline=None,
    )
