"""Loads, runs and saves the real shape of SD 2.1's UNet (865.9 M parameters), here and in diffusers.

python benchmarks/real_shape_unet.py --folder=/tmp/sd21-unet --dtype=float16

The weights are random, written by diffusers where the folder does not exist. Every measurement has a process of
its own, one at a time. Needs the test extras, 2 (float16) or 4 (float32) GB of disk, twice that with `--save`,
and 10 GB of memory. Files that were read lately lie in the system's cache: so do they for both programs.
"""

import concurrent.futures
import multiprocessing
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import app, flags

_FOLDER = flags.DEFINE_string("folder", None, "Where the UNet is, or is written to.", required=True)
_DTYPE = flags.DEFINE_enum("dtype", "float16", ["float16", "float32"], "The type of the weights written.")
_SAVE = flags.DEFINE_bool("save", False, "Also measure writing the loaded weights back.")
_RUN = flags.DEFINE_bool("run", True, "Also compare and measure a float32 forward at 64x64 latents.")

SD21 = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
BOUND = 1e-4


def alone(function: Callable, *args: Any) -> Any:
    """Calls a function in a process of its own, whose memory goes with it."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def memory(field: str) -> float:
    """Returns VmRSS (the memory that this process holds) or VmHWM (its peak), in GB."""
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(field)).split()[1]) * 1024 / 1e9


def measured(function: Callable) -> tuple[str, Any]:
    """Returns the seconds and the memory that a call took, as text, and its result."""
    before, start = memory("VmRSS"), time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    return f"{seconds:.2f} s, peak {memory('VmHWM'):.2f} GB ({before:.2f} GB before)", result


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns latents [1, 64, 64, 4], timesteps [1] and context [1, 77, 1024]."""
    rng = np.random.default_rng(0)
    latents, context = (rng.standard_normal(shape, np.float32) for shape in ((1, 64, 64, 4), (1, 77, 1024)))
    return latents, np.array([500], np.int32), context


def write(folder: str, dtype: str) -> None:
    """Writes random weights with diffusers."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel.from_config(SD21)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # off the zeros and ones that they start from
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder)


def load_ours(folder: str, out: str | None) -> list[str]:
    """Loads as it is, and saves if told where."""
    from sbv2_jax.convert.component import load_component, save_component
    from sbv2_jax.tree import count

    text, part = measured(lambda: load_component(folder))
    lines = [f"parameters: {count(part.params):,}", f"load, ours: {text}"]
    if out:
        text, _ = measured(lambda: save_component(out, part.config, part.params))
        lines.append(f"save, ours: {text}")
    return lines


def load_theirs(folder: str, out: str | None) -> list[str]:
    """The same in diffusers."""
    import torch
    from diffusers import UNet2DConditionModel

    def load():
        return UNet2DConditionModel.from_pretrained(folder, torch_dtype=getattr(torch, _dtype(folder)))

    text, model = measured(load)
    lines = [f"load, diffusers: {text}"]
    if out:
        text, _ = measured(lambda: model.save_pretrained(out))
        lines.append(f"save, diffusers: {text}")
    return lines


def _dtype(folder: str) -> str:
    from sbv2_jax.convert.safetensors_io import DTYPES
    from sbv2_jax.convert.weights import open_weights

    infos = open_weights(pathlib.Path(folder), "diffusion_pytorch_model").infos
    return DTYPES[infos["conv_in.weight"].dtype].name


def run_ours(folder: str) -> tuple[np.ndarray, str]:
    """Returns the output [1, 64, 64, 4] of a float32 forward, and what it took."""
    import jax

    from sbv2_jax.convert.component import load_component
    from sbv2_jax.models.registry import network

    part = load_component(folder, dtype="float32")
    params = {name: jax.device_put(part.params.pop(name)) for name in list(part.params)}
    apply = jax.jit(network(part.config).apply)
    start = time.perf_counter()
    compiled = apply.lower(params, *inputs()).compile()
    compile_seconds = time.perf_counter() - start
    compiled(params, *inputs()).block_until_ready()
    start = time.perf_counter()
    output = np.asarray(compiled(params, *inputs()))
    seconds = time.perf_counter() - start
    return output, (
        f"{seconds:.2f} s a forward, {compile_seconds:.0f} s to compile, peak {memory('VmHWM'):.2f} GB"
    )


def run_theirs(folder: str) -> tuple[np.ndarray, str]:
    """The same in diffusers."""
    import torch
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    latents, timesteps, context = (torch.from_numpy(array) for array in inputs())
    with torch.no_grad():
        for _ in range(2):
            start = time.perf_counter()
            output = model(latents.permute(0, 3, 1, 2).contiguous(), timesteps, context).sample
            seconds = time.perf_counter() - start
    return (
        output.permute(0, 2, 3, 1).numpy(),
        f"{seconds:.2f} s a forward, peak {memory('VmHWM'):.2f} GB",
    )


def main(_: list[str]) -> None:
    folder = pathlib.Path(_FOLDER.value)
    if not folder.exists():
        alone(write, str(folder), _DTYPE.value)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"files: {size / 1e9:.2f} GB, {_dtype(str(folder))}", flush=True)
    for load in (load_ours, load_theirs):
        out = folder.with_name(f"{folder.name}-saved") if _SAVE.value else None
        print("\n".join(alone(load, str(folder), out and str(out))), flush=True)
        if out:
            shutil.rmtree(out)
    if not _RUN.value:
        return
    ours, text = alone(run_ours, str(folder))
    print(f"run, ours: {text}", flush=True)
    theirs, text = alone(run_theirs, str(folder))
    print(f"run, diffusers: {text}")
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"max relative error: {error:.1e} (bound {BOUND:.0e})")
    if not error < BOUND:
        raise SystemExit(1)


if __name__ == "__main__":
    app.run(main)
