"""How ranked layouts read."""

from __future__ import annotations

import io

from rich.console import Console

from ultrafuser_mega.reporting.layout_table import LayoutRow, layout_table, longest

GIB = 2**30


def row(layout: str, note: str | None = None) -> LayoutRow:
    kinds = ("weights", "gradients", "optimizer", "activations", "loss")
    return LayoutRow(
        layout=layout,
        seconds=10.25,
        mfu=0.3012,
        idle=0.07,
        parts={"products": 5.0, "tp traffic": 3.0, "elementwise": 1.0, "host": 0.1},
        peak=81.9 * GIB,
        phase="backward",
        kinds=dict.fromkeys(kinds, 27.3 * GIB),
        flops=3.5e15,
        nbytes={"tp": 1.5e12, "pp": 0.0, "dp": 29.3e9, "fusion": 1.25e9},
        note=note,
    )


def printed(rows: list[LayoutRow], more: int = 0) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=120).print(layout_table("16 x h100-80g", rows, more))
    return [line.rstrip() for line in text.getvalue().splitlines()]


def test_a_layout_takes_two_lines_of_120_columns() -> None:
    lines = printed([row("disjoint 4x2 + 4x2 + 8x2 dp 16"), row("colocated tp 8 dp 2")])
    text = "\n".join(lines)
    assert "…" not in text
    assert max(map(len, lines)) <= 120
    assert len([line for line in lines if line.strip()]) == 3 + 2 * 2  # title, header, rule
    for part in (
        "10.25",
        "30.1%",
        "7%",
        "81.9",
        "backward",
        "opt 27.3 act 27.3 loss 27.3",
        "3,500",
        "tp 1,500 dp 29 fusion 1.2",
    ):
        assert part in text, part


def test_what_takes_longest_comes_first_and_what_is_little_not_at_all() -> None:
    assert longest(row("").parts) == "products 55%, tp traffic 33%"


def test_a_layout_that_does_not_fit_says_why_and_how_many_are_not_shown() -> None:
    text = " ".join(" ".join(printed([row("colocated tp 8 dp 2", "save needs 81.9 of 74.1 GiB")], more=5)).split())
    assert "save needs 81.9 of 74.1 GiB" in text
    assert "5 more layouts are slower or do not fit" in text


def test_groups_without_traffic_are_left_out() -> None:
    assert "pp" not in "\n".join(printed([row("colocated tp 8 dp 2")]))
