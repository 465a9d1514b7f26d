"""Distils a text-to-image teacher into a one-step student; run again, it resumes.

python launch/train.py --config=configs/openmoji.py --workdir=runs/openmoji
"""

from absl import flags
from ml_collections import config_flags

from sbv2_jax import cli
from sbv2_jax.run.config_fields import FIELDS

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run: FILE.py or FILE.py:ARGUMENT.")
_WORKDIR = cli.define_path("workdir", "Directory of checkpoints, metrics, pictures and the export.")
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print what would be held where, and stop.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, of several processes.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes the run has.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is.", lower_bound=0)
_POD = flags.DEFINE_boolean("pod", False, "Find the other processes by a TPU pod's metadata, SLURM or MPI.")
_FORCE = cli.define_force(
    "force", "Resume in spite of what has changed: --force, or --force=student.lr,teacher."
)


def main() -> int:
    # jax is loaded only once the flags are right
    from sbv2_jax.devices import processes
    from sbv2_jax.devices.cache import use_cache
    from sbv2_jax.run.loop import train

    # Several processes share a place that `train` chooses.
    if not processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, pod=_POD.value):
        use_cache()
    return train(_CONFIG.value, _WORKDIR.value, dry_run=_DRY_RUN.value, force=_FORCE.value)


def command() -> None:
    """The command, as it is installed."""
    cli.run(main, required=("config", "workdir"), config_fields=FIELDS)


if __name__ == "__main__":
    command()
