"""Tables of pictures: their names, and where these stand."""

import numpy as np
import pytest

from sbv2_jax.generate.pictures import grid

SIDE, TEXT = 128, 8  # pixels of a picture; of the captions, which are empty here


def table(*names: str) -> np.ndarray:
    picture = np.full((1, SIDE, SIDE, 3), 100, np.uint8)
    return grid(dict.fromkeys(names, picture), [""])


@pytest.mark.parametrize(
    "name", ["bundled, 8 steps, guidance 2, seed 0", "runs/openmoji-with-a-name-of-many-letters"]
)
def test_a_long_name_takes_lines_and_no_room_of_the_next_column(name):
    whole = table(name, " ")
    header = len(whole) - SIDE - 4
    assert header in (20 + 15, 20 + 30)
    assert (whole[header : header + SIDE, TEXT : TEXT + SIDE] == 100).all()
    ink = np.flatnonzero((whole[:header] < 128).any((0, 2)))
    assert ink.min() >= TEXT and ink.max() < TEXT + SIDE
    assert (whole[20:header] < 128).any(), "what the first line does not hold is in the next"


def test_a_short_name_takes_one_line():
    assert len(table("teacher", "student")) == 20 + SIDE + 4
