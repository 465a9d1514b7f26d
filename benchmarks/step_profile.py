"""Tells what the main job's step spends its time on, here and in eager PyTorch: operations by their kind.

python benchmarks/step_profile.py

A line of JSON for each side and kind, largest first: its share of the time of all operations, and that share of the
seconds of a step, for operations may run side by side.
"""

import os
import tempfile

_DUMP = tempfile.TemporaryDirectory(prefix="sbv2_jax_hlo_")
# Before jax reads it: the compiled programs' text says what each operation was written as.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={_DUMP.name} --xla_dump_hlo_as_text"
)

import gzip  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import statistics  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import torch  # noqa: E402
from absl import flags  # noqa: E402
from compiled_step import CompiledStep  # noqa: E402
from eager_step import EagerStep  # noqa: E402
from side_by_side import in_turns  # noqa: E402

from sbv2_jax import cli  # noqa: E402
from sbv2_jax.fields import load  # noqa: E402

_ROUNDS = flags.DEFINE_integer("rounds", 5, "Steps of each side that are timed.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 64, "Images of a step.", lower_bound=1)
_PROFILED = 3
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*?metadata=\{[^}]*op_name=\"([^\"]*)\"")
# What JAX calls an operation, and what PyTorch does; the rest is element by element.
_KINDS = {
    "convolutions": r"conv_general_dilated|aten::\w*conv\w*",
    "matrix products": r"dot_general|aten::(mm|addmm|bmm|baddbmm|_scaled_dot_product_\w+)",
    "sums and norms": r"reduce_\w+|aten::(sum|mean|native_\w+_norm\w*|linalg_vector_norm|_foreach_norm)",
    "layouts and copies": r"transpose|reshape|copy|concatenate|split|slice|aten::(copy_|clone|cat|slice_backward)",
}


def main() -> None:
    config = load("configs/openmoji.py").unlock()
    config.batch_size = _BATCH.value
    jax.config.update("jax_enable_compilation_cache", False)  # what comes from there leaves no text
    ours = CompiledStep(config)
    sides = {
        "sbv2_jax": ours,
        "PyTorch eager": EagerStep(config, ours.tokenizers["input_ids"], ours.batches),
    }
    seconds = in_turns(sides, _ROUNDS.value)
    found = {"sbv2_jax": _of_xla(ours), "PyTorch eager": _of_torch(sides["PyTorch eager"])}
    for side, times in found.items():
        step = statistics.median(seconds[side])
        for kind, time in times.most_common():
            share = time / times.total()
            line = {"kind": kind, "share": round(share, 4), "seconds": round(share * step, 4)}
            print(json.dumps({"figure": "time of a step, configs/openmoji.py", "side": side, **line}))


def _of_xla(step: Callable[[], None]) -> Counter[str]:
    with tempfile.TemporaryDirectory() as trace:
        with jax.profiler.trace(trace):
            for _ in range(_PROFILED):
                step()
        (path,) = Path(trace).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    written = _written(Path(_DUMP.name))
    found: Counter[str] = Counter()
    for event in events:
        of = event.get("args") or {}
        if event.get("ph") == "X" and "hlo_op" in of:
            name = written.get((of["hlo_module"], of["hlo_op"]))
            # What XLA itself has put in has no name: copies, mostly, and fusions that it took apart.
            own = "layouts and copies" if "copy" in of["hlo_op"] else "not named"
            found[own if name is None else _kind(name.rpartition("/")[2])] += event["dur"]
    return found


def _written(dump: Path) -> dict[tuple[str, str], str]:
    """Returns what JAX called each operation, by (module, name in the compiled program)."""
    found = {}
    for path in dump.glob("*after_optimizations.txt"):
        text = path.read_text()
        module = re.match(r"HloModule ([\w.-]+)", text)[1]
        for line in text.splitlines():
            if match := _INSTRUCTION.match(line):
                found[module, match[1]] = match[2]
    return found


def _of_torch(step: Callable[[], None]) -> Counter[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(_PROFILED):
            step()
    found: Counter[str] = Counter()
    for event in profile.key_averages():
        found[_kind(event.key)] += event.self_cpu_time_total
    return found


def _kind(name: str) -> str:
    return next((kind for kind, names in _KINDS.items() if re.fullmatch(names, name)), "element by element")


if __name__ == "__main__":
    cli.run(main)
