"""Phases of a step: seconds of nested ones, and which one runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ultrafuser_mega.runtime.phases import IDLE, Phases


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    yield clock


def test_a_phase_inside_another_takes_its_seconds_from_it_and_all_add_up_to_the_step(clock: Clock) -> None:
    phases = Phases()
    clock.now = 1.0
    with phases("forward"):
        clock.now = 3.0
        with phases("loss"):
            assert phases.current == "loss"
            clock.now = 7.0
        assert (phases.current, phases.since) == ("forward", 7.0)
        clock.now = 8.0
    assert phases.current == IDLE
    clock.now = 20.0
    assert phases.of_last_step() == {}
    phases.end_step()
    assert phases.of_last_step() == {"other": 13.0, "forward": 3.0, "loss": 4.0}


def test_a_step_holds_what_came_behind_the_step_before(clock: Clock) -> None:
    phases = Phases()
    with phases("data"):
        clock.now = 2.0
    phases.end_step()
    with phases("loss"):
        clock.now = 5.0
    assert phases.of_last_step() == {"other": 0.0, "data": 2.0}
    phases.end_step()
    assert phases.of_last_step() == {"other": 0.0, "loss": 3.0}
    phases.restart()
    assert phases.of_last_step() == {}


def test_a_whole_phase_counts_what_is_inside_it_and_names_both(clock: Clock) -> None:
    phases = Phases()
    with phases("save", whole=True):
        clock.now = 1.0
        with phases("evaluation", whole=True), phases("forward of text"):
            assert phases.current == "forward of text in save"
            clock.now = 4.0
        clock.now = 5.0
    phases.end_step()
    assert phases.of_last_step() == {"other": 0.0, "save": 5.0}
    assert phases.host_seconds == {"save": 5.0}


def test_an_error_leaves_its_phase() -> None:
    phases = Phases()
    with pytest.raises(ValueError), phases("loss"):
        raise ValueError
    assert phases.current == IDLE


def test_a_gpus_seconds_are_between_events_and_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []

    class Event:
        made = 0

        def __init__(self, device: torch.device, enable_timing: bool) -> None:
            assert enable_timing and device.type == "cuda"

        def record(self) -> None:
            Event.made += 1
            self.place = Event.made

        def query(self) -> bool:
            return self.place in done

        def elapsed_time(self, other: Any) -> float:
            return 500.0 * (other.place - self.place)

    monkeypatch.setattr(torch, "Event", Event)
    phases = Phases(torch.device("cuda", 0))
    with phases("forward"), phases("loss"):
        pass
    phases.end_step()
    assert phases.of_last_step() == {}
    done.append(Event.made)
    assert phases.of_last_step() == {"other": 1.0, "forward": 1.0, "loss": 0.5}  # bounds: begin, in, in, out, out, end


def test_a_profiler_sees_phases_as_ranges() -> None:
    phases = Phases()
    with profile(activities=[ProfilerActivity.CPU]) as profiler, phases("forward of text"):
        torch.ones(2) + 1
    assert "forward of text" in {event.name for event in profiler.events()}


def test_a_sign_of_life_restarts_what_is_watched_and_leaves_seconds_as_they_are(clock: Clock) -> None:
    phases = Phases()
    with phases("answering", whole=True):
        clock.now = 5.0
        phases.go_on()
        assert (phases.current, phases.since) == ("answering", 5.0)
        clock.now = 8.0
    phases.end_step()
    assert phases.of_last_step()["answering"] == phases.host_seconds["answering"] == 8.0
