"""Phases of a step: seconds of nested ones, and which one runs."""

from __future__ import annotations

import time

import pytest

from ultrafuser_mega.runtime.phases import IDLE, Phases


def test_a_phase_inside_another_takes_its_seconds_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 7.0, 8.0, 20.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    phases = Phases()
    with phases("forward"):  # at 1
        with phases("loss"):  # at 3
            assert phases.current == "loss"
        assert phases.current == "forward"  # again since 7
    assert phases.current == IDLE
    assert phases.take() == {"forward": 3.0, "loss": 4.0}


def test_what_was_taken_is_not_counted_again() -> None:
    phases = Phases()
    with phases("data"):
        pass
    assert set(phases.take()) == {"data"}
    assert phases.take() == {}


def test_an_error_leaves_its_phase() -> None:
    phases = Phases()
    with pytest.raises(ValueError), phases("loss"):
        raise ValueError
    assert phases.current == IDLE
