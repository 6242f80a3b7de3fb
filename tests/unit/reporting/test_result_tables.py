"""The result tables: which rows and columns, what is bold, and how they read as Markdown and as text."""

from __future__ import annotations

import io
from typing import Any

from ultrafuser_mega.reporting.records import EvalRecord
from ultrafuser_mega.reporting.tables import gate_table, loss_table, print_tables, to_markdown


def test_loss_table_as_markdown_has_the_best_of_every_column_bold(final: Any, after_stage1: Any) -> None:
    assert to_markdown(loss_table(final, after_stage1=after_stage1)) == (
        "| model               |      text |      code |      math |      mean |\n"
        "| ------------------- | --------: | --------: | --------: | --------: |\n"
        "| fused               | **2.740** |     2.240 | **2.790** | **2.590** |\n"
        "| fused after stage 1 |     2.800 | **2.200** |     2.850 |     2.617 |\n"
        "| text                |     2.900 |     4.100 |     5.900 |     4.300 |\n"
        "| code                |     5.200 |     2.300 |     6.100 |     4.533 |\n"
        "| math                |     6.600 |     6.900 |     2.950 |     5.483 |\n"
    )


def test_yardsticks_stand_below_the_models_and_are_never_bold(with_yardsticks: Any) -> None:
    assert to_markdown(loss_table(with_yardsticks)) == (
        "| model            |      text |      code |      math |      mean |\n"
        "| ---------------- | --------: | --------: | --------: | --------: |\n"
        "| fused            | **2.740** | **2.240** | **2.790** | **2.590** |\n"
        "| text             |     2.900 |     4.100 |     5.900 |     4.300 |\n"
        "| code             |     5.200 |     2.300 |     6.100 |     4.533 |\n"
        "| math             |     6.600 |     6.900 |     2.950 |     5.483 |\n"
        "| uniform logits   |     3.900 |     3.400 |     3.600 |     3.633 |\n"
        "| oracle per class |     2.900 |     2.300 |     2.950 |     2.717 |\n"
        "| oracle per token |     2.500 |     2.100 |     2.300 |     2.300 |\n"
    )


def test_gate_table_is_the_papers_table_6(final: Any) -> None:
    assert to_markdown(gate_table(final)) == (
        "| weight | text data | code data | math data |\n"
        "| ------ | --------: | --------: | --------: |\n"
        "| w_text |  **0.45** |      0.23 |      0.18 |\n"
        "| w_code |      0.29 |  **0.59** |      0.39 |\n"
        "| w_math |      0.26 |      0.18 |  **0.43** |\n"
    )


def test_classes_and_specialists_may_differ_in_name_and_number() -> None:
    record = EvalRecord(
        stage=2,
        step=1,
        loss={name: {"fused": 1.0, "general": 2.0} for name in ("law", "medicine", "chat")},
        gate={name: {"general": 0.7, "expert|x": 0.3} for name in ("law", "medicine", "chat")},
    )
    assert loss_table(record).columns == ["law", "medicine", "chat", "mean"]
    assert gate_table(record).rows == ["w_general", "w_expert|x"]
    assert "| w_expert\\|x |" in to_markdown(gate_table(record))


def test_a_value_that_is_missing_or_not_finite_is_never_best() -> None:
    record = EvalRecord(stage=2, step=1, loss={"a": {"fused": float("nan"), "x": 3.0}, "b": {"fused": 1.0}}, gate={})
    table = loss_table(record)
    assert [table.cell(row, 0) for row in (0, 1)] == ["-", "3.000"]
    assert table.best == [[False, True, False], [True, False, False]]
    assert table.cell(1, 1) == "-"


def test_a_column_best_that_ties_exactly_is_bold_twice_but_not_one_that_only_rounds_alike() -> None:
    losses = {"a": {"fused": 1.00001, "x": 1.0, "y": 1.0}}
    table = loss_table(EvalRecord(stage=2, step=1, loss=losses, gate={}))
    assert [row[0] for row in table.best] == [False, True, True]


def test_printed_to_a_file_a_wide_table_keeps_every_column_whole() -> None:
    classes = [f"a-class-with-a-long-name-{index}" for index in range(8)]
    gate = {name: {"general": 0.75, "other": 0.25} for name in classes}
    output = io.StringIO()
    print_tables([gate_table(EvalRecord(stage=2, step=1, loss={}, gate=gate))], file=output)
    header = next(line for line in output.getvalue().splitlines() if "weight " in line and "a-class" in line)
    assert all(f"{name} data" in header for name in classes)
    assert "\x1b" not in output.getvalue()
