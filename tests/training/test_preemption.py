"""SIGTERM is noted while somebody asks for it, and ends the process as ever if nobody did."""

import signal

import pytest

from klong_jax.training.preemption import noticing_preemption


def test_the_signal_is_noted_and_taken_up() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with noticing_preemption() as preemption:
        assert not preemption.asked()
        signal.raise_signal(signal.SIGTERM)
        assert not preemption.agreed, "nobody has asked since"
        assert preemption.asked()
    assert preemption.agreed
    assert signal.getsignal(signal.SIGTERM) == before


def test_one_that_nobody_took_up_is_sent_again() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with noticing_preemption():
            signal.raise_signal(signal.SIGTERM)
            assert not received
        assert received == [signal.SIGTERM]
        with pytest.raises(ValueError, match="first"), noticing_preemption():
            signal.raise_signal(signal.SIGTERM)
            raise ValueError("a mistake is said first")
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
