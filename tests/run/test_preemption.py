"""The signals that end a run: the first is noted, the second is not held up."""

import signal

import pytest

from sbv2_jax.run.preemption import Preemption

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_second_ends_the_process(number):
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    with Preemption() as preemption:
        assert not preemption.requested()
        signal.raise_signal(number)
        assert preemption.requested() and preemption.requested()
        for each in before:
            assert signal.getsignal(each) == signal.SIG_DFL, "a second one is no longer caught"
    assert {each: signal.getsignal(each) for each in before} == before
