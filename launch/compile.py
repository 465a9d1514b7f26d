"""Compiles the training step for TPUs that are not here, and says whether it fits.

python launch/compile.py --config=configs/tpu_v4.py --topology=v4:2x2x4

Exit code 1 where it does not fit, with what would make it fit; that too was compiled.
"""

import functools
import os

from absl import flags, logging
from ml_collections import config_flags

from sbv2_jax import cli
from sbv2_jax.run.config_fields import FIELDS

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run: FILE.py or FILE.py:ARGUMENT.")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "GENERATION:AxBxC, such as v4:2x2x4 or v5e:4x4; v4:2x2x4*2 is two slices."
)
_ADVICE = flags.DEFINE_boolean(
    "advice", True, "Where it does not fit, compile what takes less until one does."
)
_WORKERS = flags.DEFINE_integer(
    "workers", 1, "Stages compiled at a time; each takes gigabytes.", lower_bound=1
)
_EFFORT = flags.DEFINE_float(
    "effort", -1.0, "What the compiler spends on speed; 0 is its default.", lower_bound=-1.0, upper_bound=1.0
)


def main() -> int:
    # No device is used here; libtpu would look for TPUs, and complain.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # jax is loaded only once the flags are right
    import jax

    from sbv2_jax.plan.advice import advise
    from sbv2_jax.plan.plan import compile_for
    from sbv2_jax.plan.report import text_of

    # A program for a TPU that is not here cannot be read back from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    logging.set_verbosity(logging.INFO)  # each program as it is compiled, on stderr
    compiled = functools.partial(
        compile_for,
        topology=_TOPOLOGY.value,  # type: ignore[arg-type]  # it is required
        workers=_WORKERS.value,
        effort=_EFFORT.value,
    )
    plan = compiled(_CONFIG.value)
    print(text_of(plan), flush=True)
    if plan.fits:
        return 0
    if _ADVICE.value:
        for changes, advised in advise(_CONFIG.value, plan.devices, compiled):
            overrides = " ".join(f"--config.{name}={value}" for name, value in changes.items())
            print(f"\nwith {overrides}:\n{text_of(advised)}", flush=True)
    return 1


def command() -> None:
    """The command, as it is installed."""
    cli.run(main, required=("config", "topology"), config_fields=FIELDS)


if __name__ == "__main__":
    command()
