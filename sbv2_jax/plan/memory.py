"""The memory that a step takes of one device: the arrays alive at each of its programs, and the compiler's own."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from sbv2_jax.devices.programs import Separate
from sbv2_jax.devices.sharding import bytes_per_device


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a program: the arrays, as shapes, that it took and gave."""

    name: str
    taken: list[jax.ShapeDtypeStruct]
    given: list[jax.ShapeDtypeStruct]


class Recorded(Separate):
    """Separate programs that remember, in order, what each call took and gave."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.calls: list[Call] = []

    def run(
        self, name: str, function: Callable, *args: Any, out: Any = None, donate: tuple[int, ...] = ()
    ) -> Any:
        """Runs, compiles or returns as `Separate` does."""
        # Copied, for what the second call of a program gives is another array than what the first gave.
        result = jax.tree.map(copy.copy, super().run(name, function, *args, out=out, donate=donate))
        self.calls.append(Call(name, jax.tree.leaves(args), jax.tree.leaves(result)))
        return result


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes on one device while a program runs: arrays between programs, temporaries, results and code."""

    arrays: int
    temporaries: int
    results: int
    code: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.arrays + self.temporaries + self.results + self.code


def needs(programs: Recorded, resident: Any) -> dict[str, Need]:
    """Returns what each program needs, the largest of its calls; `resident` is what outlives the step.

    An array lives from the call that gives it to the last one that takes it. The code of all programs stays
    loaded.
    """
    compiled = programs.compiled()
    analyses: dict[str, Any] = {name: program.memory_analysis() for name, program in compiled.items()}
    code = sum(analysis.generated_code_size_in_bytes for analysis in analyses.values())
    last = {id(leaf): number for number, call in enumerate(programs.calls) for leaf in call.taken}
    alive = {id(leaf): leaf for leaf in jax.tree.leaves(resident)}
    stays = set(alive)
    found: dict[str, Need] = {}
    for number, call in enumerate(programs.calls):
        alive |= {id(leaf): leaf for leaf in call.taken}
        if call.name in analyses:  # a stage without arrays has no program
            analysis = analyses[call.name]
            need = Need(
                arrays=sum(bytes_per_device(leaf, leaf.sharding) for leaf in alive.values()),
                temporaries=analysis.temp_size_in_bytes,
                results=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
                code=code,
            )
            found[call.name] = max(need, found.get(call.name, need), key=lambda need: need.total)
        alive |= {id(leaf): leaf for leaf in call.given}
        alive = {key: leaf for key, leaf in alive.items() if key in stays or last.get(key, -1) > number}
    return found
