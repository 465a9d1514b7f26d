"""The step of a tiny world in PyTorch, and its batch."""

import tiny_world
import torch
import torch_reference
from tiny_world import World
from torch_reference import integers, nchw

from sbv2_jax.convert.formats.names import params_to_torch
from sbv2_jax.distill.gradients import FRESH
from sbv2_jax.distill.student import Start
from sbv2_jax.models.conditions import split_towers


def make_reference(world: World, predictions: dict[str, str]) -> torch_reference.Reference:
    """Returns the PyTorch version of a world, by its configuration and with its weights."""
    config, frozen = world.config, world.frozen
    method = torch_reference.Method(
        **predictions,
        total_steps=config.steps,
        timesteps=world.run.method.student.timesteps,
        weighting=config.vsd.weighting,
        score_weighting=config.score.weighting,
        guidance=config.vsd.guidance,
        score_guidance=config.vsd.score_guidance,
        vsd_weight=config.vsd.weight,
        clip_weight=config.clip.weight,
        tau=config.clip.tau,
        ema=config.ema,
        student_lr=config.student.lr,
        score_lr=config.score.lr,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        clip_norm=config.optimizer.clip_norm,
    )
    xl = {}
    if world.run.parts.text_encoder_2 is not None:
        side = tiny_world.LATENTS[0] * world.run.parts.vae.config.downsampling
        zero_null = world.run.parts.zero_null
        xl = {"text_2": tiny_world.TEXT_2, "side": side, "zero_null": zero_null}
    decoders = {"vae": ("kl", tiny_world.KL_VAE), "vae_tiny": ("tiny", tiny_world.TINY_VAE)}
    reference = torch_reference.Reference(
        method,
        unet=tiny_world.UNET_XL if xl else tiny_world.UNET,
        text=tiny_world.TEXT,
        clip=tiny_world.CLIP,
        vae=decoders[config.clip.decoder] if "clip" in frozen else None,
        student_lora=config.student.lora.to_dict() if world.run.lora_student else None,
        score_lora=config.score.to_dict(),
        **xl,
    )
    towers = split_towers(frozen["text_encoder"], world.run.parts.text_encoders)
    pairs = [
        (reference.teacher, frozen["teacher"]),
        (reference.student, frozen.get("student", {}) | world.student),
        (reference.text, towers["text_encoder"]),
    ]
    if world.score:  # else the run has none
        pairs.append((reference.score, frozen["teacher"] | world.score))
    if xl:
        pairs.append((reference.text_2, towers["text_encoder_2"]))
    if "clip" in frozen:
        pairs += [(reference.clip, frozen["clip"]), (reference.vae, frozen["decoder"])]
    for module, params in pairs:
        torch_reference.load(module, params_to_torch(params))
    reference.start()
    return reference


def torch_start(z) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Returns what PyTorch's student begins with: z, the noises of its later steps, how many are behind."""
    if not isinstance(z, Start):
        return nchw(z), [], 0
    (taken,) = {*z.taken.tolist()}
    return nchw(z.z), [nchw(z.again[:, number]) for number in range(z.again.shape[1])], taken


def torch_ids(world: World) -> tuple[torch.Tensor, ...]:
    """Returns the ids of the prompts, of the CLIP loss's prompts if there is one, and of the null prompt."""
    own = [ids for column, ids in world.batch.items() if column.endswith("input_ids") and column != FRESH]
    return tuple(integers(a) for a in (*own, world.empty))
