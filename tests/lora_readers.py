"""LoRA files as PEFT and diffusers read them, and pictures drawn with them."""

import functools
import re
from pathlib import Path

import jax
import numpy as np
from conftest import relative_error
from diffusers import StableDiffusionPipeline as TorchPipeline
from diffusers import UNet2DConditionModel as TorchUNet
from parity import nchw

import sbv2_jax
from sbv2_jax.convert.formats.names import params_from_torch
from sbv2_jax.tree import Shapes

PROMPTS = ["a red apple", "dog"]


def drawn_by(pipe: TorchPipeline, noise: np.ndarray) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "np"}
    return pipe(PROMPTS, latents=nchw(noise), **settings).images


def drawn_by_us(directory: Path, noise: np.ndarray) -> np.ndarray:
    model = sbv2_jax.load(directory)
    draw = jax.jit(functools.partial(sbv2_jax.generate, model.generator))
    ids, null = model.tokenizer.encode(PROMPTS), model.tokenizer.encode([""])[0]
    return np.asarray(draw(model.params, ids, null, noise))


def merged_by_peft(unet: TorchUNet, shapes: Shapes) -> dict[str, np.ndarray]:
    """The weights after PEFT's own merge, under our names."""
    for module in unet.modules():
        if hasattr(module, "base_layer"):
            module.merge()
    state = {
        name.replace(".base_layer", ""): tensor.detach().numpy()
        for name, tensor in unet.state_dict().items()
        if not re.search(r"\.(lora|hada|lokr)_", name)
    }
    return params_from_torch(state, shapes)


def assert_close(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert relative_error(got[name], want[name]) < 1e-6, name
