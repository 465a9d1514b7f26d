"""Exports of what a run holds on its devices: whole and the same bits, with one array at a time on the host."""

import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from made_run import make_run
from tiny_pipeline import write_pipeline

from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.models import lora
from sbv2_jax.run import streamed


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_an_export_asks_for_each_array_once_and_lets_it_go(tmp_path, monkeypatch, mode):
    write_pipeline(tmp_path)
    held, inner = [], streamed._whole

    def whole(leaf):
        if mode == "full":  # the factors of a LoRA are small
            assert sum(each() is not None for each in held) <= 1, "arrays are kept"
        found = inner(leaf)
        held.append(weakref.ref(found))
        return found

    monkeypatch.setattr(streamed, "_whole", whole)
    made = make_run(tmp_path, mode, **{"student.mode": mode, "ema": 0.0})
    assert len(held) == len(made.state.student)
    want, start = made.state.student, load_component(tmp_path / "pipeline" / "unet", dtype=jnp.float32).params
    if mode == "lora":
        want = lora.merge(start, want, 2.0)
    got = load_component(made.directory / "export" / "unet").params
    assert got.keys() == want.keys()
    for name in got:
        np.testing.assert_array_equal(got[name], np.asarray(want[name]), strict=True)
    assert any(not np.array_equal(got[name], start[name]) for name in got)
