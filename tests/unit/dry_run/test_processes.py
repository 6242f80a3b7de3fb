"""Dry runs as ``plan --dry-run`` starts them: in processes whose end is told in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.trio import DISJOINT_8, config_tree

from ultrafuser_mega.dry_run.processes import rehearse_ranks
from ultrafuser_mega.errors import InputError


def test_ranks_come_back_in_the_order_asked_for_with_all_their_parts(trio: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config_tree(trio, tmp_path, DISJOINT_8)))  # JSON is YAML
    done: list[int] = []
    first, last = rehearse_ranks([6, 0], 8, "cpu", path, ["stage1.steps=0"], lambda: done.append(1))
    assert (first.rank, last.rank) == (6, 0)
    assert [part.name for part in first.parts] == ["evaluation", "stage 2", "checkpoint"]
    assert len(done) == 2


def test_a_compiler_that_fails_is_one_line_that_says_what_would_work(
    trio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config_tree(trio, tmp_path, DISJOINT_8)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(InputError, match=r"^--dry-run: rank 0: device=cuda: false cannot build .*; set device=cpu$"):
        rehearse_ranks([0], 8, "cuda", path, [])
    assert not list(tmp_path.glob("ultrafuser_mega/*"))  # nothing half-built stays
