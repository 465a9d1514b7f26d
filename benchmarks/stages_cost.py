"""Times a step in stages beside the same step as one program: what the separate programs cost at run time.

python benchmarks/stages_cost.py --config=configs/openmoji.py --pairs=10

The two take turns, on the same batches and from the same state; the first pair is not counted.
"""

import statistics
import tempfile
import time
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags
from tqdm import trange

from sbv2_jax import cli
from sbv2_jax.data.prompts import prompt_batches
from sbv2_jax.run.arrays import load_frozen, load_state
from sbv2_jax.run.batches import next_batch
from sbv2_jax.run.compilation import compile_step
from sbv2_jax.run.loop import prepare

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run: FILE.py or FILE.py:ARGUMENT.")
_PAIRS = flags.DEFINE_integer("pairs", 10, "Steps of each kind.", lower_bound=2)
KINDS = ("one", "stages")


def main() -> None:
    config = _CONFIG.value
    with tempfile.TemporaryDirectory() as empty:
        run, layout, source, tokenizers, fillings, start, *_ = prepare(config, Path(empty))
    frozen = load_frozen(run, tokenizers["input_ids"].encode([""])[0], layout.frozen)
    steps, states = {}, {}
    for kind in KINDS:
        config.programs = kind
        begin = time.perf_counter()
        steps[kind], programs = compile_step(config, run, layout)
        print(f"{kind}: {len(programs.compiled())} program(s) in {time.perf_counter() - begin:.1f} s")
        states[kind] = load_state(run, layout.state, start)
    batches = prompt_batches(source, config.batch_size, config.seed)
    seconds = {kind: [] for kind in KINDS}
    for number in trange(_PAIRS.value + 1, unit="pair"):
        batch = next_batch(batches, tokenizers, layout.mesh, run.method.updates, fillings, number)
        for kind in KINDS if number % 2 else KINDS[::-1]:
            begin = time.perf_counter()
            states[kind], metrics = steps[kind](states[kind], frozen, batch)
            jax.block_until_ready((states[kind], metrics))
            seconds[kind].append(time.perf_counter() - begin)
    for kind in KINDS:
        counted = sorted(seconds[kind][1:])
        print(
            f"{kind}: median {statistics.median(counted):.3f} s a step ({counted[0]:.3f} to {counted[-1]:.3f})"
        )
    ratios = sorted(b / a for a, b in zip(*(seconds[kind][1:] for kind in KINDS), strict=True))
    print(
        f"stages / one: median {statistics.median(ratios):.3f}, in pairs {ratios[0]:.3f} to {ratios[-1]:.3f}"
    )


if __name__ == "__main__":
    cli.run(main, required=("config",))
