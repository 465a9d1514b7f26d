"""Draws pairs for image regularisation: prompts, and what the teacher draws of known noise. Run again, it goes on.

python launch/pairs.py --model=bundled --prompts=openmoji --count=2000 --guidance=1.5 --out=runs/pairs
"""

from absl import flags

from sbv2_jax import cli

_MODEL = cli.define_path("model", "The teacher: a diffusers directory, a hub id, or 'bundled'.")
_PROMPTS = cli.define_path("prompts", "The prompts: as a run's config.prompts.")
_COLUMN = flags.DEFINE_string("column", "", "The column or key of the prompts, where there are several.")
_OUT = cli.define_path("out", "A directory for the pairs, and what they were drawn from.")
_COUNT = flags.DEFINE_integer("count", None, "How many pairs.", lower_bound=1, upper_bound=2**31 - 1)
_STEPS = flags.DEFINE_integer("steps", 25, "Steps of the teacher.", lower_bound=1)
_GUIDANCE = flags.DEFINE_float("guidance", 4.5, "Classifier-free guidance; 1 or less is none.")
_SAMPLER = flags.DEFINE_enum("sampler", "dpm", ("ddim", "dpm"), "The sampler of more than one step.")
_SEED = flags.DEFINE_integer(
    "seed", 0, "Of the noise and the order of the prompts.", lower_bound=0, upper_bound=2**32 - 1
)
_BATCH = flags.DEFINE_integer("batch", 16, "Pairs that a device draws at a time.", lower_bound=1)
_PRECISION = flags.DEFINE_enum(
    "precision", "float32", ("float32", "bfloat16"), "Of the teacher's arithmetic."
)
_DTYPE = flags.DEFINE_enum("dtype", "float16", ("float16", "float32"), "Of the latents that are written.")
_RESOLUTION = flags.DEFINE_integer(
    "resolution", 0, "Pixels a side; 0 is what the teacher's UNet was made for.", lower_bound=0
)
_SHARD_SIZE = flags.DEFINE_integer(
    "shard_size", 1024, "Pairs of a file; one that was interrupted is drawn again.", lower_bound=1
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, of several processes.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is.", lower_bound=0)
_POD = flags.DEFINE_boolean("pod", False, "Find the other processes by a TPU pod's metadata, SLURM or MPI.")


def main() -> None:
    # jax is loaded only once the flags are right
    from sbv2_jax.devices import processes
    from sbv2_jax.devices.cache import use_cache
    from sbv2_jax.run.pairs import Drawing, make_pairs

    processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, pod=_POD.value)
    use_cache()
    make_pairs(
        _MODEL.value,
        _PROMPTS.value,
        _OUT.value,
        Drawing(_STEPS.value, _GUIDANCE.value, _SAMPLER.value, _SEED.value, _PRECISION.value),
        column=_COLUMN.value,
        resolution=_RESOLUTION.value,
        count=_COUNT.value,
        dtype=_DTYPE.value,
        shard_size=_SHARD_SIZE.value,
        batch_size=_BATCH.value,
    )


if __name__ == "__main__":
    cli.run(main, required=("model", "prompts", "out", "count"))
