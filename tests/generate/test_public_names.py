"""The names of the package, before and after its rooms have been imported."""

import inspect

import pytest

import sbv2_jax


def test_the_public_function_and_the_room_share_a_name():
    # Sets the attribute `generate` of the package to the room.
    from sbv2_jax.generate import inference, pipeline
    from sbv2_jax.run import drawn

    assert inspect.ismodule(sbv2_jax.generate) and sbv2_jax.generate.inference is inference
    with pytest.raises(TypeError, match=r"generate\(\) missing .* 'params', 'input_ids'"):
        sbv2_jax.generate(None)
    assert sbv2_jax.load is drawn.load and sbv2_jax.Pipeline is pipeline.Pipeline
