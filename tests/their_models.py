"""Tiny models of diffusers and transformers, and what is done to their directories."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import diffusers
import ml_dtypes
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

TEXT = {
    "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 2,
    "vocab_size": 600, "bos_token_id": 520, "eos_token_id": 521, "pad_token_id": 521, "projection_dim": 12,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2, "num_hidden_layers": 1,
    "image_size": 12, "patch_size": 4,
}  # fmt: skip
UNET = {
    "sample_size": 8, "block_out_channels": [16, 24], "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": [2, 4], "cross_attention_dim": 24,
}  # fmt: skip
VAE = {
    "block_out_channels": [8, 16], "norm_num_groups": 4, "sample_size": 16, "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip
TINY_VAE = {
    "encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8],
    "num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1],
}  # fmt: skip


def clip_text(cls):
    return cls(transformers.CLIPTextConfig(**TEXT))


def clip():
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)
    )


MODELS = {
    "UNet2DConditionModel": lambda: diffusers.UNet2DConditionModel.from_config(
        UNET | {"use_linear_projection": True}
    ),
    "AutoencoderKL": lambda: diffusers.AutoencoderKL.from_config(VAE),
    "AutoencoderTiny": lambda: diffusers.AutoencoderTiny.from_config(TINY_VAE),
    "CLIPTextModel": lambda: clip_text(transformers.CLIPTextModel),
    "CLIPTextModelWithProjection": lambda: clip_text(transformers.CLIPTextModelWithProjection),
    "CLIPModel": clip,
}
TYPES = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
}


def their_model(name: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


class Log(logging.Handler):
    """Collects what diffusers and transformers log from warnings upwards."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """Gives a list that the warnings of diffusers and transformers go to."""
    handler = Log()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler.messages
    for logger in loggers:
        logger.removeHandler(handler)


def weights_file(directory: Path) -> Path:
    (path,) = directory.glob("*.safetensors")
    return path


def rewrite(directory: Path, change) -> None:
    """Applies a function to the dictionary of tensors of a directory's one weights file."""
    path = weights_file(directory)
    tensors = load_file(path)
    save_file(change(tensors) or tensors, path)
