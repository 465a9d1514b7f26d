"""Distils a text-to-image teacher into a one-step student; run again, it resumes.

python launch/train.py --config=configs/openmoji.py --workdir=runs/openmoji
"""

from absl import flags
from ml_collections import config_flags

from sbv2_jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run: FILE.py or FILE.py:ARGUMENT.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of checkpoints, metrics, pictures and the export.")
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print what would be held where, and stop.")
_FORCE = flags.DEFINE_boolean("force", False, "Resume in spite of a changed configuration.")


def main() -> int:
    from sbv2_jax.train import train  # jax is loaded only once the flags are right

    return train(_CONFIG.value, _WORKDIR.value, dry_run=_DRY_RUN.value, force=_FORCE.value)


if __name__ == "__main__":
    cli.run(main, required=("config", "workdir"))
