"""How a rank's share of a plan reads."""

from __future__ import annotations

import pytest
from rich.table import Table

from ultrafuser_mega.reporting.plan_table import RankShare, plan_table


def column(table: Table, header: str) -> list[str]:
    (found,) = (column for column in table.columns if column.header == header)
    return [str(cell) for cell in found.cells]


def share(vocabulary_rows: range | None, host: float = 0.0, **peaks: float) -> RankShare:
    stages = {int(name[-1]): count for name, count in peaks.items()}
    return RankShare(
        rank=3,
        specialists=("text", "code"),
        tensor=(1, 2),
        stage=(0, 4),
        vocabulary_rows=vocabulary_rows,
        parameters=1234567,
        kinds={number: {"weights": count, "loss": count / 2} for number, count in stages.items()},
        peaks={number: ("save", count) for number, count in stages.items()},
        host=dict.fromkeys(stages, host),
    )


def test_places_count_from_one() -> None:
    table = plan_table("colocated: ...", [share(range(8))])
    found = {header: column(table, header)[0] for header in ("rank", "specialist", "tp", "stage", "parameters")}
    assert found == {"rank": "3", "specialist": "text, code", "tp": "2/2", "stage": "1/4", "parameters": "1,234,567"}
    assert table.title == "colocated: ..."


def test_vocabulary_rows_are_a_span_padding_or_none() -> None:
    table = plan_table("", [share(range(72, 144)), share(range(32, 32)), share(None)])
    assert column(table, "vocabulary rows") == ["72-143", "padding", "-"]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (3 * 2**20, "3 MiB"), (2.5 * 2**30, "2.5 GiB")]
)
def test_sizes_are_in_the_largest_unit_that_they_fill(count: float, text: str) -> None:
    table = plan_table("", [share(None, stage1=count, stage2=count)])
    assert column(table, "weights") == [text]
    assert column(table, "stage 1") == column(table, "stage 2") == [f"{text} save"]


def test_kinds_are_those_of_the_last_stage_and_peaks_of_all() -> None:
    table = plan_table("", [share(None, stage1=1.0, stage2=8.0)])
    assert (column(table, "weights"), column(table, "loss")) == (["8 B"], ["4 B"])
    assert (column(table, "stage 1"), column(table, "stage 2")) == (["1 B save"], ["8 B save"])


@pytest.mark.parametrize("stages", [["stage1", "stage2"], ["stage2"], ["stage1"], []])
def test_only_stages_that_have_steps_have_a_column(stages: list[str]) -> None:
    table = plan_table("", [share(None, **dict.fromkeys(stages, 1))])
    headers = [str(column.header) for column in table.columns]
    kinds = ["weights", "loss"] if stages else []
    assert headers[headers.index("parameters") + 1 :] == kinds + [name.replace("stage", "stage ") for name in stages]
    assert bool(table.caption) == bool(stages)


def test_host_memory_has_a_column_where_any_is_taken() -> None:
    assert column(plan_table("", [share(None, host=3 * 2**20, stage2=1.0)]), "host") == ["3 MiB"]
    assert "host" not in [column.header for column in plan_table("", [share(None, stage2=1.0)]).columns]
