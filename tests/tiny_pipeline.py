"""A tiny pipeline directory of random weights, written by diffusers and transformers themselves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from diffusers import StableDiffusionPipeline as TorchPipeline
from diffusers import StableDiffusionXLPipeline as TorchPipelineXL
from parity import randomised
from tiny_tokenizer import write_tokenizer
from tiny_world import ONE_LEVEL
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from sbv2_jax.convert.formats.pipeline import save_pipeline

LENGTH = 12
# SDXL's two towers, of different widths and depths, and a UNet for what they give and six sizes.
XL_TEXT = {"num_hidden_layers": 2}
XL_TEXT_2 = {"hidden_size": 20, "num_hidden_layers": 3, "projection_dim": 10, "hidden_act": "gelu"}
XL_UNET = {
    "cross_attention_dim": 12 + 20,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 10 + 6 * 4,
}
BLOCKS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SMALL_UNET = {"block_out_channels": (8,), **ONE_LEVEL}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def write_pipeline(
    directory: Path,
    *,
    prediction_type: str = "epsilon",
    seed: int = 0,
    xl: bool = False,
    zero_null: bool = True,
    blocks: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a pipeline of 32 px pictures with `clip/` and `vae_tiny/` beside it; returns its directory.

    With `xl` it is one of SDXL, whose null condition is zeros if `zero_null`. `blocks` are the UNet's, where they are
    not the default ones.
    """
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(directory / "written", 1 if xl else 2, LENGTH))
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 12,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": LENGTH,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "hidden_size": 12,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        **(blocks or BLOCKS),
        **(XL_UNET if xl else {"cross_attention_dim": 12}),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.7,
    )
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    parts = {
        "vae": randomised(vae),
        "text_encoder": randomised(CLIPTextModel(CLIPTextConfig(**text | (XL_TEXT if xl else {})))),
        "tokenizer": tokenizer,
        "unet": randomised(unet),
        "scheduler": DDIMScheduler(**BETAS, prediction_type=prediction_type, clip_sample=False),
    }
    if xl:
        second = CLIPTextModelWithProjection(CLIPTextConfig(**text | XL_TEXT_2))
        pipeline = TorchPipelineXL(
            **parts,
            text_encoder_2=randomised(second),
            tokenizer_2=CLIPTokenizer.from_pretrained(write_tokenizer(directory / "written_2", 2, LENGTH)),
            force_zeros_for_empty_prompt=zero_null,
            add_watermarker=False,
        )
    else:
        pipeline = TorchPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    path = directory / "pipeline"
    pipeline.save_pretrained(path)
    randomised(tiny).save_pretrained(path / "vae_tiny")
    randomised(clip).save_pretrained(path / "clip")
    return path


def write_world(directory: Path) -> Path:
    """Writes a pipeline, of a small UNet, and a file of prompts for runs to train on; returns the directory."""
    write_pipeline(directory, blocks=SMALL_UNET)
    (directory / "prompts.txt").write_text("a red apple\na dog\nred dog\napple\nan apple\n")
    return directory


def write_one_step(directory: Path) -> Path:
    """Writes the pipeline of `write_pipeline` as one that draws in one step; returns its directory."""
    path = directory / "one_step"
    save_pipeline(path, base=write_pipeline(directory), one_step=True)
    return path
