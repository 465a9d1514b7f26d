"""A tiny pipeline directory of random weights, written by diffusers and transformers themselves."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from diffusers import StableDiffusionPipeline as TorchPipeline
from parity import randomised
from test_tokenizer import write_tokenizer
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LENGTH = 12
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def write_pipeline(directory: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Writes a pipeline of 32 px pictures with `clip/` and `vae_tiny/` beside it; returns its directory."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(directory / "written", 2, LENGTH))
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
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
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
    pipeline = TorchPipeline(
        vae=randomised(vae),
        text_encoder=randomised(CLIPTextModel(CLIPTextConfig(**text))),
        tokenizer=tokenizer,
        unet=randomised(unet),
        scheduler=DDIMScheduler(**BETAS, prediction_type=prediction_type, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    path = directory / "pipeline"
    pipeline.save_pretrained(path)
    randomised(tiny).save_pretrained(path / "vae_tiny")
    randomised(clip).save_pretrained(path / "clip")
    return path
