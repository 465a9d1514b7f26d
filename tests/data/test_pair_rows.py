"""Pairs as they are read: what is refused, and which of them stands in which row of which batch."""

import json
from pathlib import Path

import numpy as np
import pytest
from made_pairs import write_pairs

from sbv2_jax.data.pairs import Pairs
from sbv2_jax.data.rows import Filling, spread
from sbv2_jax.errors import InputError

ELSEWHERE = {
    "pair_numbers": np.full((), -1, np.int32),
    "pair_seeds": np.zeros((), np.uint32),
    "pair_latents": np.zeros((2, 2, 3), np.float32),
}


def test_a_pair_is_read_by_its_number(tmp_path):
    latents = write_pairs(tmp_path / "pairs")
    pairs = Pairs(tmp_path / "pairs")
    assert len(pairs) == 7 and pairs.made_from == {"teacher": "another digest"}
    for index in (6, 0, 3):
        prompt, columns = pairs[index]
        assert prompt == f"prompt {index}"
        np.testing.assert_array_equal(columns["pair_latents"], latents[index])
        assert (columns["pair_numbers"], columns["pair_seeds"]) == (index, 5)
        assert columns["pair_numbers"].dtype == np.int32 and columns["pair_latents"].dtype == np.float32
    with pytest.raises(IndexError):
        pairs[7]


def test_the_fingerprint_is_of_the_content(tmp_path):
    for name, changes in (("a", {}), ("b", {}), ("c", {"seed": 6})):
        write_pairs(tmp_path / name, **changes)
    write_pairs(tmp_path / "d", count=8)
    first, again, *others = (Pairs(tmp_path / name).fingerprint() for name in "abcd")
    assert first == again and len({first, *others}) == 3


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.array_record"))


def say(directory: Path, **changes) -> None:
    path = directory / "manifest.json"
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


REFUSED = {
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "has no manifest.json"),
    "no JSON": (lambda d: (d / "manifest.json").write_text("{"), "not readable JSON"),
    "another manifest": (lambda d: (d / "manifest.json").write_text("{}"), "is not of pairs: format, count"),
    "another format": (lambda d: say(d, format=2), "has format 2; 1 is read"),
    "a wrong type": (lambda d: say(d, seed="5"), "is not of pairs: seed missing or of another type"),
    "a wrong number": (lambda d: say(d, count=0), "wrong count"),
    "no shards of a size": (lambda d: say(d, shard_size=0), "wrong shard_size"),
    "an unknown dtype": (lambda d: say(d, dtype="int8"), "wrong dtype"),
    "a flat shape": (lambda d: say(d, latent_shape=[12]), "wrong latent_shape"),
    "other shards": (lambda d: say(d, shards={"../x": "0"}), "wrong shards"),
    "unfinished": (lambda d: say(d, shards=None), "not finished: run the launch/pairs.py"),
    "missing shards": (
        lambda d: [path.unlink() for path in shards(d)[1:]],
        "2 of its 3 shards are missing: pairs-00001-of-00003.array_record; pairs-00002",
    ),
    "a torn shard": (lambda d: shards(d)[0].write_bytes(shards(d)[0].read_bytes()[:100]), "not a whole array_record"),
    "a shard in another's place": (
        lambda d: shards(d)[2].write_bytes(shards(d)[1].read_bytes()),
        "9 pairs in its shards; its manifest.json says 7",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_whole_is_refused_in_one_line(tmp_path, case):
    write_pairs(tmp_path / "pairs")
    change, message = REFUSED[case]
    change(tmp_path / "pairs")
    with pytest.raises(InputError, match=message) as raised:
        Pairs(tmp_path / "pairs")
    assert "\n" not in str(raised.value)


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Pairs(tmp_path / "pairs")


def test_changed_content_is_found(tmp_path):
    write_pairs(tmp_path / "pairs")
    one, two, _ = shards(tmp_path / "pairs")
    pairs = Pairs(tmp_path / "pairs", "config.pairs.path = ")
    both = one.read_bytes(), two.read_bytes()
    one.write_bytes(both[1]), two.write_bytes(both[0])
    with pytest.raises(InputError, match=f"{one.name}; {two.name}"):
        pairs.fingerprint()
    with pytest.raises(
        InputError, match="^config.pairs.path = .*pair 0: its record is not that of this pair"
    ):
        Pairs(tmp_path / "pairs", "config.pairs.path = ")[0]


def test_a_damaged_record_is_refused_with_its_number(tmp_path):
    write_pairs(tmp_path / "pairs")
    shard = shards(tmp_path / "pairs")[0]
    flip(shard, shard.read_bytes().index(b"prompt 1"))
    with pytest.raises(InputError, match="pairs, pair 1: "):
        Pairs(tmp_path / "pairs")[1]


@pytest.mark.parametrize(("count", "batch"), [(1, 8), (8, 64), (3, 16), (16, 16), (5, 8)])
def test_rows_are_spread_evenly(count, batch):
    rows = spread(count, range(batch))
    assert len(set(rows)) == count and set(rows) <= set(range(batch))
    for parts in (2, 4, 8):
        held = [
            sum(part * batch // parts <= row < (part + 1) * batch // parts for row in rows)
            for part in range(parts)
        ]
        assert max(held) - min(held) <= 1 and (count % parts or len(set(held)) == 1)
    with pytest.raises(InputError, match=f"{batch + 1} rows of a batch are asked for, and {batch} are left"):
        spread(batch + 1, range(batch))


def filling(directory: Path, rows=(1, 4, 6), **changes) -> Filling:
    return Filling(
        Pairs(directory), changes.get("elsewhere", ELSEWHERE), rows, changes.get("seed", 3), "pairs"
    )


def test_the_rows_of_a_step_depend_on_seed_and_step_alone(tmp_path):
    latents = write_pairs(tmp_path / "pairs")
    prompts = [f"plain {row}" for row in range(8)]
    seen = []
    straight = filling(tmp_path / "pairs")
    for step in range(7):
        filled, columns = straight.fill(step, prompts)
        numbers = columns["pair_numbers"]
        assert [row for row in range(8) if numbers[row] >= 0] == [1, 4, 6]
        for row, number in enumerate(numbers):
            assert filled[row] == (f"prompt {number}" if number >= 0 else f"plain {row}")
            want = latents[number] if number >= 0 else np.zeros((2, 2, 3))
            np.testing.assert_array_equal(columns["pair_latents"][row], want)
        assert columns["pair_latents"].dtype == np.float32 and columns["pair_seeds"].dtype == np.uint32
        seen += [int(numbers[row]) for row in (1, 4, 6)]
        again = filling(tmp_path / "pairs").fill(step, prompts)
        assert again[0] == filled and all(np.array_equal(again[1][name], columns[name]) for name in columns)
    epochs = [seen[:7], seen[7:14], seen[14:]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs), "each pair once before any comes again"
    assert len(set(map(tuple, epochs))) == 3, "each epoch in an order of its own"
    other = [filling(tmp_path / "pairs", seed=4).fill(step, prompts)[1]["pair_numbers"] for step in range(3)]
    assert [int(numbers[row]) for numbers in other for row in (1, 4, 6)] != seen[:9]
    assert prompts == [f"plain {row}" for row in range(8)]


def test_processes_fill_their_own_rows_of_the_same_batch(tmp_path):
    write_pairs(tmp_path / "pairs")
    prompts, one = [f"plain {row}" for row in range(8)], filling(tmp_path / "pairs")
    whole = one.fill(5, prompts)
    parts = [one.fill(5, prompts[first : first + 2], first) for first in (0, 2, 4, 6)]
    assert [prompt for part in parts for prompt in part[0]] == whole[0]
    for name, column in whole[1].items():
        np.testing.assert_array_equal(np.concatenate([part[1][name] for part in parts]), column)


def test_pairs_that_do_not_fit_the_run_are_refused(tmp_path):
    write_pairs(tmp_path / "pairs", count=2)
    with pytest.raises(InputError, match="^pairs: 2 rows, and each batch takes 3$"):
        filling(tmp_path / "pairs")
    other = ELSEWHERE | {"pair_latents": np.zeros((4, 4, 3), np.float32)}
    with pytest.raises(
        InputError, match=r"its pair_latents are float32 \[2, 2, 3\], this run's float32 \[4, 4, 3\]"
    ):
        filling(tmp_path / "pairs", (0,), elsewhere=other)
    with pytest.raises(InputError, match="its other are missing"):
        filling(tmp_path / "pairs", (0,), elsewhere=ELSEWHERE | {"other": np.zeros(())})
