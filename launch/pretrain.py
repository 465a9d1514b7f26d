"""Trains a text-to-image pipeline from nothing: `python launch/pretrain.py --config=FILE --workdir=DIR`.

Run again with the same --workdir it goes on where it was interrupted.
"""

import shlex
import sys

from absl import flags
from ml_collections import config_flags

from sbv2_jax import cli
from sbv2_jax.openmoji.pretrain.settings import FIELDS, validate

config_flags.DEFINE_config_file("config", help_string="a config file such as configs/openmoji_teacher.py")
cli.define_path("workdir", "where checkpoints, logs, pictures and the pipeline go")


def main() -> None:
    config = flags.FLAGS.config
    validate(config)
    from sbv2_jax.devices.cache import use_cache
    from sbv2_jax.openmoji.pretrain.run import pretrain

    use_cache()
    # The model card tells how to make the same pipeline, wherever this one was made.
    command = shlex.join([*cli.command("pretrain").split(), *_without_workdir(sys.argv[1:]), "--workdir=DIR"])
    print(f"wrote {pretrain(config, flags.FLAGS.workdir, command)}")


def _without_workdir(arguments: list[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        name, equals, _ = argument.lstrip("-").partition("=")
        if not skip and name != "workdir":
            kept.append(argument)
        skip = name == "workdir" and not equals
    return kept


def command() -> None:
    """The command, as it is installed."""
    cli.run(main, required=("config", "workdir"), config_fields=FIELDS)


if __name__ == "__main__":
    command()
