"""Times the main job's step beside the same work in eager PyTorch: diffusers' networks, peft's LoRA, fused AdamW.

python benchmarks/train_step.py --rounds=10

Both take turns in one process, on the same prompts, with random numbers of their own. A line of JSON for each side, and
for the ratio of each round. `pip install -e ".[test]"` brings PyTorch.
"""

import jax
from absl import flags
from compiled_step import CompiledStep
from eager_step import EagerStep
from side_by_side import in_turns, report

from sbv2_jax import cli
from sbv2_jax.devices.cache import use_cache
from sbv2_jax.fields import load

_ROUNDS = flags.DEFINE_integer("rounds", 10, "Steps of each side.", lower_bound=2)
_BATCH = flags.DEFINE_integer("batch_size", 64, "Images of a step.", lower_bound=1)


def main() -> None:
    use_cache()
    config = load("configs/openmoji.py").unlock()
    config.batch_size = _BATCH.value
    ours = CompiledStep(config)
    tokenizer = ours.tokenizers["input_ids"]
    eager = EagerStep(config, tokenizer, ours.batches)
    seconds = in_turns({"sbv2_jax": ours, "PyTorch eager": eager}, _ROUNDS.value)
    device = jax.devices()[0].device_kind
    report(
        "training step, configs/openmoji.py",
        seconds,
        config.batch_size,
        device=device,
        batch=config.batch_size,
    )


if __name__ == "__main__":
    cli.run(main)
