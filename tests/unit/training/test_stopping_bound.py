"""Within which time a signal ends a run (what ranks agree on is tested with whole runs)."""

from __future__ import annotations

import re

from ultrafuser_mega.training.stopping import Stopping


def test_the_bound_is_an_evaluation_a_step_and_two_saves_each_the_longest_until_now() -> None:
    stopping = Stopping(0.0, None)
    for what, seconds in [("step", 2.0), ("step", 1.0), ("evaluation", 9.0), ("checkpoint", 3.0), ("checkpoint", 4.0)]:
        stopping.took(what, seconds)
    assert stopping.bound == (
        "a signal ends the run within about 19.0 s, by the longest so far: "
        "a step 2.0, an evaluation 9.0, two checkpoints of 4.0"
    )


def test_what_has_not_been_seen_yet_counts_nothing() -> None:
    stopping = Stopping(0.0, None)
    stopping.took("step", 2.0)
    assert re.search("within about 2.0 s", stopping.bound)
