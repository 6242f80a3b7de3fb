"""What people see of a dry run."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from ultrafuser_mega.reporting.rehearsal import (
    Collective,
    Microbatch,
    Part,
    Predicted,
    Rehearsal,
    rehearsal_table,
    waits_of,
)

MIB = 2**20
STAGE = Part(
    name="stage 2",
    microbatches=[Microbatch({"text": [100, 28]}, 90), Microbatch({"text": [128]}, 80)],
    peak={"weights": 3 * MIB, "activations": 5 * MIB},
    flops={"products": 4 * 10**12, "attention": 2 * 10**12},
    operations={"aten.mm": 30, "aten.view": 10},
    collectives=[Collective("tp", "allreduce", 4, 6 * 10**9)],
    waits={"a number is read at training/totals.py:57": 1},
)
SAVED = Part("checkpoint", [], {"weights": 3 * MIB}, {}, {}, [], {"a copy": 7})


def shown(rehearsal: Rehearsal) -> str:
    console = Console(width=150)
    predicted = {(4, "stage 2"): Predicted(8.5 * MIB, 6.1e12)}
    with console.capture() as capture:
        console.print(rehearsal_table("a title", [("text 1/2", rehearsal)], predicted))
    return capture.get()


def test_a_part_is_a_row_with_its_memory_and_the_work_of_one_microbatch_beside_the_formula() -> None:
    lines = shown(Rehearsal(4, [STAGE, SAVED])).splitlines()
    stage = next(line for line in lines if "stage 2" in line)
    assert stage.split() == [
        "4",
        "text",
        "1/2",
        "stage",
        "2",
        "3.00",
        "5.00",
        "8.00",
        "8.50",
        "3",
        "3.05",
        "3",
        "GB",
        "20",
        "1",
    ]
    saved = next(line for line in lines if "checkpoint" in line)
    assert saved.split() == ["checkpoint", "3.00", "3.00", "0"]


def test_memory_has_the_unit_that_its_largest_number_is_read_in() -> None:
    assert "memory in MiB" in shown(Rehearsal(4, [STAGE]))


def test_places_where_a_step_waits_are_named_once_and_those_of_a_checkpoint_are_not() -> None:
    assert waits_of([Rehearsal(4, [STAGE, SAVED]), Rehearsal(5, [STAGE])]) == [
        "the host waits 1 time(s) a step: a number is read at training/totals.py:57"
    ]


def test_pinned_host_memory_has_a_column_where_there_is_any() -> None:
    text = shown(Rehearsal(4, [STAGE, replace(SAVED, host=7 * MIB)]))
    assert "host: what is pinned" in text and "7.00" in text
    assert "host" not in shown(Rehearsal(4, [STAGE, SAVED]))


def test_a_rehearsal_survives_the_way_through_json() -> None:
    rehearsal = Rehearsal(4, [STAGE, SAVED])
    assert Rehearsal.from_json(rehearsal.as_json()) == rehearsal
