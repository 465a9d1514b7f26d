"""Draws pictures from prompts: in one step with a student, in more with a teacher.

python launch/generate.py --model=runs/openmoji/export --prompt="a red apple on a blue background" --out=apple.png
"""

from absl import flags

from sbv2_jax import cli
from sbv2_jax.diffusion.samplers import SAMPLERS

_MODEL = flags.DEFINE_string("model", None, "A diffusers directory, a hub id, or 'bundled'.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be given several times.")
_PROMPTS = flags.DEFINE_string("prompts", None, "A file of prompts instead: text, CSV, JSON, Parquet ...")
_COLUMN = flags.DEFINE_string("column", "", "The column or key of the prompts in that file.")
_OUT = flags.DEFINE_string("out", None, "A .png file (several pictures become a grid), or a directory.")
_NUM = flags.DEFINE_integer("num", 1, "Pictures for each prompt.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=2**32 - 1)
_NOISE = flags.DEFINE_string("noise", None, "A .npy file of float32 noise [B, h, w, 4], instead of a seed.")
_STEPS = flags.DEFINE_integer("steps", 1, "Steps; more than one samples a teacher.", lower_bound=1)
_GUIDANCE = flags.DEFINE_float("guidance", 1.0, "Classifier-free guidance; 1 or less is none.")
_SAMPLER = flags.DEFINE_enum("sampler", "dpm", SAMPLERS, "The sampler of more than one step.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Pictures drawn at a time.", lower_bound=1)


def main() -> None:
    # jax is loaded only once the flags are right
    from sbv2_jax.devices.cache import use_cache
    from sbv2_jax.generate.draw import draw

    use_cache()
    draw(
        _MODEL.value,
        _OUT.value,
        prompts=_PROMPT.value,
        prompts_file=_PROMPTS.value,
        column=_COLUMN.value,
        num=_NUM.value,
        seed=_SEED.value,
        noise_file=_NOISE.value,
        steps=_STEPS.value,
        guidance=_GUIDANCE.value,
        sampler=_SAMPLER.value,
        batch_size=_BATCH_SIZE.value,
    )


if __name__ == "__main__":
    cli.run(main, required=("model", "out"))
