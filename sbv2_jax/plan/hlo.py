"""What the text of a compiled program tells: its largest arrays, and the bytes that its collectives move."""

import dataclasses
import math
import re
from collections import defaultdict

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_MAKE_NOTHING = ("parameter", "tuple", "get-tuple-element", "bitcast", "while")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
          "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")
_OPERATION = re.compile(r'op_name="([^"]*)"')
_BODY = re.compile(r"body=%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r" s32\[\][^ ]* constant\((\d+)\)")
_FUSED = re.compile(r" fusion\(.*?calls=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TWO_BRANCHES = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:to_apply|calls)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array that a program makes on each device: its size, type and shape, and the operation that makes it."""

    bytes: int
    shape: str
    operation: str


def largest_arrays(text: str, count: int) -> list[Buffer]:
    """Returns the largest arrays that instructions of the program make, one for each shape and operation.

    What a fusion computes inside is never an array in memory.
    """
    fused = set(_FUSED.findall(text))
    found: dict[tuple[str, str], Buffer] = {}
    computation = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header[1]
        instruction = _INSTRUCTION.match(line)
        if instruction is None or computation in fused or instruction[3] in _MAKE_NOTHING:
            continue
        named = _OPERATION.search(line)
        for array in _ARRAY.finditer(instruction[2]):
            shape, operation = array[0], _tail(named[1]) if named else instruction[3]
            found[shape, operation] = Buffer(_bytes(array), shape, operation)
    return sorted(found.values(), key=lambda buffer: -buffer.bytes)[:count]


def collective_bytes(text: str) -> dict[str, int]:
    """Returns, for each kind of collective, the bytes of its results on one device in one run of the program.

    A loop's body counts as often as it runs, by the constant that its condition compares with; of branches the mean
    counts, as in `count_flops`; the halves of an asynchronous pair count once.
    """
    limits: dict[str, int] = {}
    own: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    # The computation, a loop's condition, and between how many branches the choice is.
    calls: dict[str, list[tuple[str, str, int]]] = defaultdict(list)
    computation, entry = "", ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header[1]
            entry = computation if line.startswith("ENTRY") else entry
            continue
        instruction = _INSTRUCTION.match(line)
        if instruction is None:
            continue
        kind = instruction[3].removesuffix("-start")
        if kind in _COLLECTIVES:
            sizes = [_bytes(array) for array in _ARRAY.finditer(instruction[2])]
            # The start of a pair has its operands and its results as results.
            own[computation][kind] += max(sizes) if instruction[3].endswith("-start") else sum(sizes)
        if limit := _CONSTANT.search(line):
            limits[computation] = max(int(limit[1]), limits.get(computation, 1))
        if body := _BODY.search(line):
            condition = _CONDITION.search(line)
            if condition is None:  # how often it runs would be a guess
                raise ValueError(f"a loop without a condition: {line.strip()[:200]}")
            calls[computation].append((body[1], condition[1], 1))
        elif branches := _branches(line):
            calls[computation] += [(branch, "", len(branches)) for branch in branches]
        elif called := _CALLED.search(line):
            calls[computation].append((called[1], "", 1))
    totals: dict[str, float] = defaultdict(float)

    def add(name: str, times: float) -> None:
        for kind, size in own[name].items():
            totals[kind] += times * size
        for inner, condition, among in calls[name]:
            add(inner, times * limits.get(condition, 1) / among)

    add(entry, 1)
    return {kind: round(total) for kind, total in totals.items()}


def _branches(line: str) -> list[str]:
    if several := _BRANCHES.search(line):
        return [name.strip(" %") for name in several[1].split(",")]
    return _TWO_BRANCHES.findall(line)


def _bytes(array: re.Match) -> int:
    return math.prod(int(length) for length in array[2].split(",") if length) * _BYTES.get(array[1], 4)


def _tail(operation: str) -> str:
    return "/".join(operation.split("/")[-2:])
