"""Layouts are alternatives: which one a plan takes, and that it says so."""

from __future__ import annotations

from pathlib import Path

from support.trio import COLOCATED_TP2, DISJOINT_3, ONE, config_tree

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.planning.preflight import chosen_layout, first_layouts_ranks, preflight


def test_without_a_number_of_ranks_the_first_layout_is_taken(trio: Path, tmp_path: Path) -> None:
    tree = config_tree(trio, tmp_path, DISJOINT_3)
    config = FuserConfig.model_validate(tree | {"layouts": [DISJOINT_3, ONE, COLOCATED_TP2]})
    assert first_layouts_ranks(config) == 3
    assert chosen_layout(preflight(config, 3, resume=False)) == (
        "layouts.0, for 3 rank(s); --ranks 1, 2 would take another of the layouts"
    )


def test_of_two_layouts_for_as_many_ranks_the_first_is_taken(trio: Path, tmp_path: Path) -> None:
    three = {"kind": "colocated", "dp": 3}
    tree = config_tree(trio, tmp_path, ONE)
    config = FuserConfig.model_validate(tree | {"layouts": [ONE, three, DISJOINT_3]})
    assert chosen_layout(preflight(config, 3, resume=False)).startswith("layouts.1, for 3 rank(s); --ranks 1 would")


def test_a_single_layout_has_no_alternatives_to_name(trio: Path, tmp_path: Path) -> None:
    config = FuserConfig.model_validate(config_tree(trio, tmp_path, ONE))
    assert chosen_layout(preflight(config, 1, resume=False)) == "layouts.0, for 1 rank(s)"
