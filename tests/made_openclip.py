"""Files in OpenCLIP's layout, of a small model of transformers."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from parity import randomised
from safetensors.numpy import save_file

VISION = {"image_size": 24, "patch_size": 8, "width": 24, "layers": 2, "head_width": 8, "mlp_ratio": 2.5}
TEXT = {"context_length": 9, "vocab_size": 50, "width": 16, "heads": 4, "layers": 3}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def config_file(**changes: object) -> dict:
    model = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT}
    pictures = {"size": 24, "mode": "RGB", "mean": MEAN, "std": STD, "interpolation": "bicubic"}
    return {"model_cfg": model | changes, "preprocess_cfg": pictures | {"resize_mode": "shortest"}}


def their_model(activation: str) -> transformers.CLIPModel:
    """The model of transformers of the same size, written down by hand."""
    torch.manual_seed(0)
    text = {
        "hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3,
        "vocab_size": 50, "max_position_embeddings": 9, "eos_token_id": 49, "bos_token_id": 48,
        "pad_token_id": 0, "hidden_act": activation,
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": 60, "num_attention_heads": 3, "num_hidden_layers": 2,
        "image_size": 24, "patch_size": 8, "hidden_act": activation,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    return randomised(transformers.CLIPModel(config)).eval()


def original_tensors(model: transformers.CLIPModel) -> dict[str, np.ndarray]:
    """The weights under OpenCLIP's names, as its modules hold them, read off the modules of transformers."""

    def tower(prefix: str, layers) -> dict[str, torch.Tensor]:
        found = {}
        for number, layer in enumerate(layers):
            attention, start = layer.self_attn, f"{prefix}transformer.resblocks.{number}."
            qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
            found |= {
                f"{start}attn.in_proj_weight": torch.cat([one.weight for one in qkv]),
                f"{start}attn.in_proj_bias": torch.cat([one.bias for one in qkv]),
            }
            for name, module in (
                ("attn.out_proj", attention.out_proj),
                ("ln_1", layer.layer_norm1),
                ("ln_2", layer.layer_norm2),
                ("mlp.c_fc", layer.mlp.fc1),
                ("mlp.c_proj", layer.mlp.fc2),
            ):
                found |= {f"{start}{name}.weight": module.weight, f"{start}{name}.bias": module.bias}
        return found

    text, vision = model.text_model, model.vision_model
    found = {
        "token_embedding.weight": text.embeddings.token_embedding.weight,
        "positional_embedding": text.embeddings.position_embedding.weight,
        "ln_final.weight": text.final_layer_norm.weight,
        "ln_final.bias": text.final_layer_norm.bias,
        "text_projection": model.text_projection.weight.T,
        "visual.class_embedding": vision.embeddings.class_embedding,
        "visual.conv1.weight": vision.embeddings.patch_embedding.weight,
        "visual.positional_embedding": vision.embeddings.position_embedding.weight,
        "visual.ln_pre.weight": vision.pre_layrnorm.weight,
        "visual.ln_pre.bias": vision.pre_layrnorm.bias,
        "visual.ln_post.weight": vision.post_layernorm.weight,
        "visual.ln_post.bias": vision.post_layernorm.bias,
        "visual.proj": model.visual_projection.weight.T,
        "logit_scale": model.logit_scale,
        **tower("", text.encoder.layers),
        **tower("visual.", vision.encoder.layers),
    }
    return {name: tensor.detach().contiguous().numpy() for name, tensor in found.items()}


def write(directory: Path, tensors: dict[str, np.ndarray], **changes: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "open_clip_config.json").write_text(json.dumps(config_file(**changes)))
    save_file(tensors, directory / "open_clip_model.safetensors")
    return directory
