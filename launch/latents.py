"""Encodes captioned pictures, which the GAN loss takes for real ones. Run again, it goes on.

python launch/latents.py --model=bundled --pictures=openmoji --out=runs/real
"""

from argparse import Namespace

from sbv2_jax import cli
from sbv2_jax.cli import Flag, path
from sbv2_jax.fields import one_of, text, whole

FLAGS = (
    Flag(
        *("model", "The teacher: a diffusers directory, a hub id, or 'bundled'; its autoencoder encodes."),
        *(path, text()),
        required=True,
    ),
    Flag(
        "pictures",
        "A folder of pictures, the caption of cat.png in cat.txt; 'openmoji'; or captioned pictures of your own, as "
        "'package.module:NAME' or 'file.py:NAME'.",
        path,
        text(),
        required=True,
    ),
    Flag("out", "A directory for the latents, and what they were made from.", path, text(), required=True),
    Flag("count", "How many of the pictures, the first ones; 0 is all.", int, whole(0, 2**31 - 1), default=0),
    Flag("batch_size", "Pictures that a device encodes at a time.", int, whole(1), default=16),
    Flag(
        *("dtype", "Of the latents that are written, 'float16' or 'float32'.", str),
        one_of("float16", "float32"),
        default="float16",
    ),
    Flag("resolution", "Pixels a side; 0 is what the teacher's UNet was made for.", int, whole(0), default=0),
    Flag(
        *("shard_size", "Latents of a file; one that was interrupted is made again.", int, whole(1)),
        default=1024,
    ),
    *cli.PROCESSES,
)


def main(given: Namespace) -> None:
    # jax is loaded only once the flags are right
    from sbv2_jax.devices import processes
    from sbv2_jax.devices.cache import use_cache
    from sbv2_jax.run.latents import make_latents

    processes.join(given.coordinator, given.num_processes, given.process_id, pod=given.pod)
    use_cache()
    make_latents(
        given.model,
        given.pictures,
        given.out,
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
