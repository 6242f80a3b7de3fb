"""Which of the ranks that have come to a halt is the one that hangs, and how the others say so."""

from __future__ import annotations

from ultrafuser_mega.runtime.watchdog import Sign, describe, goes_on


def sign(rank: int, phase: str, seconds: float, step: int = 5, **more: object) -> Sign:
    return Sign(rank, 9, step, f"stage 1 step {step} of 10", phase, seconds, **more)  # type: ignore[arg-type]


def last_line(*signs: Sign) -> str:
    return describe(signs).splitlines()[-1]


def test_a_rank_that_does_not_answer_is_named_before_all_others() -> None:
    stopped = sign(2, "loss", 3.0, answers=False)
    assert last_line(sign(0, "exchange", 700.0), sign(1, "exchange", 701.0), stopped) == (
        "failed: rank 2 of 3 does not answer in loss, stage 1 step 5 of 10; ranks 0, 1 in exchange"
    )


def test_a_rank_a_step_behind_hangs_rather_than_one_longer_in_its_phase() -> None:
    assert last_line(sign(0, "data", 700.0, step=6), sign(1, "save", 650.0)).startswith(
        "failed: rank 1 of 2 hangs for 650 s in save, stage 1 step 5 of 10; rank 0 in data"
    )


def test_a_rank_that_waits_for_others_does_not_hang_and_of_the_others_the_one_longest_in_its_phase() -> None:
    waits = sign(0, "exchange", 702.0, waits=True)
    ranks = waits, sign(1, "backward", 700.0, stack="  a line\n"), sign(2, "backward", 701.0, stack="  its line\n")
    assert describe(ranks).splitlines()[0] == "  its line"
    assert last_line(*ranks).startswith("failed: rank 2 of 3 hangs for 701 s in backward")


def test_a_large_job_names_some_of_the_ranks_that_wait() -> None:
    ranks = [sign(0, "data", 700.0), *(sign(rank, "exchange", 600.0, waits=True) for rank in range(1, 512))]
    assert last_line(*ranks).endswith("; ranks 1, 2, 3, 4, 5, 6, 7, 8, ... in exchange")


def test_who_waits_goes_on_as_long_as_another_does_in_the_same_phase_of_the_same_step() -> None:
    own = sign(0, "answering", 700.0)
    assert goes_on(own, [own, sign(1, "answering", 3.0)], 600.0)
    assert not goes_on(own, [own, sign(1, "answering", 601.0)], 600.0)
    assert not goes_on(own, [own, sign(1, "exchange", 3.0), sign(2, "answering", 3.0, step=4)], 600.0)
