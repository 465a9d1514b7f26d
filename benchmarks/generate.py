"""Times drawing beside diffusers: a batch, and one picture, of a pipeline of one step or many.

python benchmarks/generate.py --model=bundled --steps=1 --rounds=20

Both take turns in one process, from prompts to pictures on the host. A line of JSON for each side, and for the ratio of
each round. `pip install -e ".[test]"` brings PyTorch.
"""

import jax
import torch
from absl import flags
from diffusers import DDIMScheduler, DiffusionPipeline
from side_by_side import in_turns, report

import sbv2_jax
from sbv2_jax import cli
from sbv2_jax.convert.formats.resolve import resolve
from sbv2_jax.devices.cache import use_cache
from sbv2_jax.diffusion.schedule import is_guided

_MODEL = cli.define_path("model", "A diffusers directory, a hub id, or 'bundled'.")
_STEPS = flags.DEFINE_integer("steps", 1, "Steps, of DDIM where there are several.", lower_bound=1)
_GUIDANCE = flags.DEFINE_float("guidance", 1.0, "Classifier-free guidance; 1 or less is none.")
_BATCH = flags.DEFINE_integer("batch_size", 64, "Pictures of the batch.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 20, "Calls of each side.", lower_bound=2)


def main() -> None:
    use_cache()
    directory, steps, guidance = resolve(_MODEL.value), _STEPS.value, _GUIDANCE.value
    ours = sbv2_jax.load(directory)
    theirs = DiffusionPipeline.from_pretrained(directory, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, timestep_spacing="trailing")
    scale = guidance if is_guided(guidance) else 0.0
    for count in dict.fromkeys((_BATCH.value, 1)):
        prompts = ["a large red apple on a blue background"] * count
        sides = {
            "sbv2_jax": lambda prompts=prompts: ours.draw(
                prompts, steps=steps, guidance=guidance, sampler="ddim"
            ),
            "diffusers": lambda prompts=prompts: theirs(
                prompts, num_inference_steps=steps, guidance_scale=scale, output_type="np"
            ),
        }
        seconds = in_turns(sides, _ROUNDS.value)
        said = {"steps": steps, "guidance": guidance, "batch": count, "device": jax.devices()[0].device_kind}
        report(f"drawing with {_MODEL.value}", seconds, count, **said)


if __name__ == "__main__":
    cli.run(main, required=("model",))
