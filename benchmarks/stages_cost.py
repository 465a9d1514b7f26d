"""Times a step in stages beside the same step as one program: what the separate programs cost at run time.

python benchmarks/stages_cost.py --config=configs/openmoji.py --rounds=10

The two take turns, on the same batches and from the same state. A line of JSON for each, and for the ratio of
their images, round by round.
"""

import jax
from absl import flags
from compiled_step import CompiledStep
from ml_collections import config_flags
from side_by_side import in_turns, report

from sbv2_jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run: FILE.py or FILE.py:ARGUMENT.")
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Steps of each kind.", lower_bound=2)


def main() -> None:
    config, sides = _CONFIG.value, {}
    for kind in ("stages", "one"):
        config.programs = kind
        sides[kind] = CompiledStep(config)
        print(f"{kind}: {len(sides[kind].programs.compiled())} program(s)", flush=True)
    device = jax.devices()[0].device_kind
    report("training step", in_turns(sides, _ROUNDS.value), config.batch_size, device=device)


if __name__ == "__main__":
    cli.run(main, required=("config",))
