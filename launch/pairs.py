"""Draws pairs for image regularisation: prompts, and what the teacher draws of known noise. Run again, it goes on.

python launch/pairs.py --model=bundled --prompts=openmoji --count=2000 --guidance=2 --out=runs/pairs
"""

from argparse import Namespace

from sbv2_jax import cli
from sbv2_jax.cli import Flag, path
from sbv2_jax.fields import number, one_of, text, whole

FLAGS = (
    Flag("model", "The teacher: a diffusers directory, a hub id, or 'bundled'.", path, text(), required=True),
    Flag("prompts", "The prompts: as a run's config.prompts.", path, text(), required=True),
    Flag("column", "The column or key of the prompts, where there are several.", default=""),
    Flag("out", "A directory for the pairs, and what they were drawn from.", path, text(), required=True),
    Flag("count", "How many pairs.", int, whole(1, 2**31 - 1), required=True),
    Flag("steps", "Steps of the teacher.", int, whole(1), default=25),
    Flag("guidance", "Classifier-free guidance; 1 or less is none.", float, number(), default=4.5),
    Flag("sampler", "The sampler of more than one step, 'ddim' or 'dpm'.", str, one_of("ddim", "dpm"), "dpm"),
    Flag("seed", "Seed of the noise, and of the order of the prompts.", int, whole(0, 2**32 - 1), default=0),
    Flag("batch_size", "Pairs that a device draws at a time.", int, whole(1), default=16),
    Flag(
        *("precision", "Of the teacher's arithmetic, 'float32' or 'bfloat16'.", str),
        one_of("float32", "bfloat16"),
        default="float32",
    ),
    Flag(
        *("dtype", "Of the latents that are written, 'float16' or 'float32'.", str),
        one_of("float16", "float32"),
        default="float16",
    ),
    Flag("resolution", "Pixels a side; 0 is what the teacher's UNet was made for.", int, whole(0), default=0),
    Flag(
        *("shard_size", "Pairs of a file; one that was interrupted is drawn again.", int, whole(1)),
        default=1024,
    ),
    *cli.PROCESSES,
)


def main(given: Namespace) -> None:
    # jax is loaded only once the flags are right
    from sbv2_jax.devices import processes
    from sbv2_jax.devices.cache import use_cache
    from sbv2_jax.run.pairs import Drawing, make_pairs

    processes.join(given.coordinator, given.num_processes, given.process_id, pod=given.pod)
    use_cache()
    make_pairs(
        given.model,
        given.prompts,
        given.out,
        Drawing(given.steps, given.guidance, given.sampler, given.seed, given.precision),
        column=given.column,
        resolution=given.resolution,
        count=given.count,
        dtype=given.dtype,
        shard_size=given.shard_size,
        batch_size=given.batch_size,
    )


def command() -> None:
    """The command, as it is installed."""
    cli.run_flags(main, FLAGS, __doc__)


if __name__ == "__main__":
    command()
