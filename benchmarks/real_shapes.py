"""Loads, runs and saves networks of the published shapes, here and in diffusers or transformers.

python benchmarks/real_shapes.py --folder=/tmp/shapes                               (all families; 20 GB of disk)
python benchmarks/real_shapes.py --folder=/tmp/shapes --family=unet-sd21 --dtype=float32

The weights are random, written by the other library and deleted afterwards. Every measurement has a process of its
own, one at a time. Needs the test extras, and for SDXL's UNet 16 GB of memory. Files that were read lately lie in the
system's cache: so do they for both programs.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from sbv2_jax import cli
from sbv2_jax.models.published import ARCHITECTURES, CLIP_VIT_B32, TINY_VAE

_FOLDER = cli.define_path("folder", "Where the weights are written.")
_FAMILIES = flags.DEFINE_multi_string("family", [], "The networks to try; without it, all.")
_DTYPE = flags.DEFINE_enum("dtype", "float16", ["float16", "float32"], "The type of the weights written.")
_OUT = cli.define_path("out", "A .jsonl file that every family adds a line to.")

BOUND = 1e-4
REPEATS = 3
CLIP_VIT_L14 = {
    "projection_dim": 768,
    "text_config": CLIP_VIT_B32["text_config"]
    | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "vision_config": CLIP_VIT_B32["vision_config"]
    | {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A network: its class in the other library, its configuration, and how many parameters were published.

    `inputs` are shapes of what it takes, channels last; "ids" are token ids. `method` is what both libraries call.
    """

    library: str
    name: str
    config: dict[str, Any]
    parameters: int
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    method: str = "__call__"


def _unet(architecture: str, parameters: int, width: int, side: int = 16) -> Family:
    inputs = (("image", (1, side, side, 4)), ("time", (1,)), ("states", (1, 77, width)))
    if architecture == "sdxl":
        inputs += (("states", (1, 1280)), ("sizes", (1, 6)))
    config = ARCHITECTURES[architecture]["unet"]
    return Family(
        library="diffusers",
        name="UNet2DConditionModel",
        config=config,
        parameters=parameters,
        inputs=inputs,
    )


def _text(architecture: str, tower: str, parameters: int) -> Family:
    config = ARCHITECTURES[architecture][tower]
    name = config.get("architectures", ["CLIPTextModel"])[0]
    ids = (("ids", (1, 77)),)
    return Family(library="transformers", name=name, config=config, parameters=parameters, inputs=ids)


def _clip(config: dict[str, Any], parameters: int) -> Family:
    inputs = (("ids", (2, 77)), ("image", (2, 224, 224, 3)))
    return Family(
        library="transformers", name="CLIPModel", config=config, parameters=parameters, inputs=inputs
    )


_VAE = Family(
    library="diffusers",
    name="AutoencoderKL",
    config=ARCHITECTURES["sd15"]["vae"],
    parameters=83_653_863,
    inputs=(("image", (1, 16, 16, 4)),),
    method="decode",
)
FAMILIES = {
    "unet-sd15": _unet("sd15", 859_520_964, 768),
    "unet-sd21-base": _unet("sd21-base", 865_910_724, 1024),
    "unet-sd21": _unet("sd21", 865_910_724, 1024),
    "unet-sdxl": _unet("sdxl", 2_567_463_684, 2048),
    "vae-sd": _VAE,
    "vae-sdxl": dataclasses.replace(_VAE, config=ARCHITECTURES["sdxl"]["vae"]),
    "taesd": dataclasses.replace(_VAE, name="AutoencoderTiny", config=TINY_VAE, parameters=2_445_063),
    "clip-l-text": _text("sd15", "text_encoder", 123_060_480),
    "clip-h-text": _text("sd21", "text_encoder", 340_387_840),
    "clip-bigg-text": _text("sdxl", "text_encoder_2", 694_659_840),
    "clip-b32": _clip(CLIP_VIT_B32, 151_277_313),
    "clip-l14": _clip(CLIP_VIT_L14, 427_616_513),
}


def alone(function: Callable, *args: Any) -> Any:
    """Calls a function in a process of its own, whose memory goes with it."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def memory(field: str) -> float:
    """Returns VmRSS (the memory that this process holds) or VmHWM (its peak), in GB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(field)).split()[1]) * 1024 / 1e9


def measured(function: Callable[[Path], Any], out: str) -> tuple[dict[str, Any], Any]:
    """Calls a function several times with a new folder each; returns figures, and the last result.

    They are the seconds, the fewest first, and the memory, in GB, by which the first call raised the peak.
    """
    seconds, rise, result = [], 0.0, None
    for number in range(REPEATS):
        folder = Path(out) / str(number)
        result = None
        os.sync()  # what was written before is not for this call to wait for
        before, start = memory("VmRSS"), time.perf_counter()
        result = function(folder)
        seconds.append(round(time.perf_counter() - start, 2))
        rise = rise if number else memory("VmHWM") - before
        shutil.rmtree(folder, ignore_errors=True)  # loading writes none
    return {"s": sorted(seconds), "GB": round(rise, 2)}, result


def inputs_of(family: Family) -> list[np.ndarray]:
    """Returns random inputs, channels last."""
    rng = np.random.default_rng(0)
    makers = {
        "time": lambda shape: np.full(shape, 500, np.int32),
        "ids": lambda shape: rng.integers(0, 49407, shape).astype(np.int32),
        "sizes": lambda shape: np.array([[512, 512, 0, 0, 512, 512]], np.float32),
    }
    return [
        makers.get(kind, lambda shape: rng.standard_normal(shape, np.float32))(shape)
        for kind, shape in family.inputs
    ]


def _class_of(family: Family) -> type:
    import importlib

    return getattr(importlib.import_module(family.library), family.name)


def write(name: str, folder: str, dtype: str) -> None:
    """Writes random weights with the other library."""
    import torch

    family, kind = FAMILIES[name], _class_of(FAMILIES[name])
    torch.manual_seed(0)
    if family.library == "diffusers":
        model = kind.from_config(family.config)
    else:
        model = kind(kind.config_class(**family.config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # off the zeros and ones that they start from
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="100GB")


def load_ours(name: str, folder: str, out: str) -> dict[str, Any]:
    """Loads as it is, and saves."""
    from sbv2_jax.convert.formats.component import load_component, save_component
    from sbv2_jax.tree import count

    load, part = measured(lambda _: load_component(folder), out)
    save, _ = measured(lambda fresh: save_component(fresh, part.config, part.params), out)
    save_component(Path(out) / "kept", part.config, part.params)
    return {"load": load, "save": save, "parameters": count(part.params)}


def load_theirs(name: str, folder: str, out: str, dtype: str) -> dict[str, Any]:
    """The same in the other library."""
    import torch

    family = FAMILIES[name]
    option = {"torch_dtype" if family.library == "diffusers" else "dtype": getattr(torch, dtype)}
    kind = _class_of(family)  # importing it takes seconds
    load, model = measured(lambda _: kind.from_pretrained(folder, **option), out)
    save, _ = measured(lambda fresh: model.save_pretrained(fresh, max_shard_size="100GB"), out)
    return {"load": load, "save": save}


def digests(folder: str) -> dict[str, str]:
    """Returns the SHA-256 of each tensor's bytes, with its type and shape.

    A text tower's names begin with "text_model." in published files and in ours, not in those of transformers 5.
    """
    from safetensors import safe_open

    (path,) = Path(folder).glob("*.safetensors")
    found = {}
    with safe_open(path, framework="numpy") as file:
        for key in file.keys():  # noqa: SIM118 (a handle, no dictionary)
            tensor = file.get_tensor(key)
            data = hashlib.sha256(np.ascontiguousarray(tensor).view(np.uint8))
            found[key.removeprefix("text_model.")] = f"{tensor.dtype} {tensor.shape} {data.hexdigest()}"
    return found


def run_ours(name: str, folder: str) -> np.ndarray:
    """Returns the output of a float32 forward, flat."""
    import jax

    from sbv2_jax.convert.formats.component import load_component
    from sbv2_jax.models.registry import network
    from sbv2_jax.models.unet import AddedConditions

    family, part = FAMILIES[name], load_component(folder, dtype="float32")
    params = {leaf: jax.device_put(part.params.pop(leaf)) for leaf in list(part.params)}
    inputs = inputs_of(family)
    if len(inputs) == 5:
        inputs = [*inputs[:3], AddedConditions(*inputs[3:])]
    apply = network(part.config).apply
    output = jax.jit(lambda params, *inputs: apply(params, *inputs, method=family.method))(params, *inputs)
    output = getattr(output, "last_hidden_state", output)
    return np.asarray(output)


def run_theirs(name: str, folder: str) -> np.ndarray:
    """The same in the other library, channels last."""
    import torch

    family = FAMILIES[name]
    option = {"torch_dtype" if family.library == "diffusers" else "dtype": torch.float32}
    model = _class_of(family).from_pretrained(folder, **option).eval()
    tensors = [
        torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()
        if array.ndim == 4
        else torch.from_numpy(array)
        for array in inputs_of(family)
    ]
    with torch.no_grad():
        if len(tensors) == 5:
            added = {"text_embeds": tensors[3], "time_ids": tensors[4]}
            output = model(*tensors[:3], added_cond_kwargs=added)
        else:
            output = getattr(model, family.method)(*tensors)
    for field in ("logits_per_image", "last_hidden_state", "sample"):
        if hasattr(output, field):
            output = getattr(output, field)
            break
    return (output.permute(0, 2, 3, 1) if output.ndim == 4 else output).numpy()


def try_family(name: str, folder: Path, dtype: str) -> dict[str, Any]:
    """Returns all figures of a family; raises AssertionError for what does not hold."""
    family, written, saved = FAMILIES[name], str(folder / name), str(folder / f"{name}-saved")
    alone(write, name, written, dtype)
    size = sum(path.stat().st_size for path in Path(written).glob("*.safetensors"))
    row: dict[str, Any] = {"family": name, "dtype": dtype, "GB": round(size / 1e9, 2)}
    ours = alone(load_ours, name, written, saved)
    assert ours["parameters"] == family.parameters, (ours["parameters"], family.parameters)
    assert ours["load"]["GB"] < 1.3 * size / 1e9, "loading takes more than 1.3 times the file"
    assert alone(digests, f"{saved}/kept") == alone(digests, written), "a tensor came back changed"
    shutil.rmtree(saved)
    theirs = alone(load_theirs, name, written, saved, dtype)
    shutil.rmtree(saved)
    want, got = alone(run_theirs, name, written), alone(run_ours, name, written)
    shutil.rmtree(written)
    error = float(np.abs(got - want).max() / np.abs(want).max())
    assert got.shape == want.shape and error < BOUND, error
    return row | {
        "parameters": ours.pop("parameters"),
        "ours": ours,
        "theirs": theirs,
        "error": f"{error:.1e}",
    }


def main() -> None:
    folder = Path(_FOLDER.value)
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FAMILIES.value or FAMILIES:
        line = json.dumps(try_family(name, folder, _DTYPE.value))
        print(line, flush=True)
        if _OUT.value:
            with open(_OUT.value, "a", encoding="utf-8") as lines:
                lines.write(line + "\n")


if __name__ == "__main__":
    cli.run(main, required=("folder",))
