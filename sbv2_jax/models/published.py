"""The published shapes of Stable Diffusion, as their config.json files give them.

They size a run on a machine without the weights (`--dry_run`); training reads the checkpoint's own files.
"""

from typing import Any

_CLIP_L_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
_CLIP_H_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
_CLIP_BIG_G_TEXT = {
    "architectures": ["CLIPTextModelWithProjection"],
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_SD2_UNET = {
    "sample_size": 64,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}

# Each architecture's components, named as the folders of its pipeline directory.
ARCHITECTURES: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "unet": {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
        "text_encoder": _CLIP_L_TEXT,
        "vae": _VAE,
        "scheduler": _SCHEDULER | {"prediction_type": "epsilon"},
    },
    "sd21-base": {
        "unet": _SD2_UNET,
        "text_encoder": _CLIP_H_TEXT,
        "vae": _VAE,
        "scheduler": _SCHEDULER | {"prediction_type": "epsilon"},
    },
    "sd21": {
        "unet": _SD2_UNET | {"sample_size": 96, "upcast_attention": True},
        "text_encoder": _CLIP_H_TEXT,
        "vae": _VAE | {"sample_size": 768},
        "scheduler": _SCHEDULER | {"prediction_type": "v_prediction"},
    },
    "sdxl": {
        "unet": {
            "sample_size": 128,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [320, 640, 1280],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "text_encoder": _CLIP_L_TEXT,
        "text_encoder_2": _CLIP_BIG_G_TEXT,
        "vae": _VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        "scheduler": _SCHEDULER | {"prediction_type": "epsilon"},
    },
}

# The tiny decoder of these families (TAESD; its configuration is diffusers' default) and the smallest CLIP.
TINY_VAE: dict[str, Any] = {}
CLIP_VIT_B32: dict[str, Any] = {
    "projection_dim": 512,
    "text_config": {
        "vocab_size": 49408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "hidden_act": "quick_gelu",
    },
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
    },
}
