"""Fewer ranks than before: the run goes on in the layout that fits them, on the same samples."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from support.launched import RANKS, launch
from support.trio import COLOCATED_TP2, config_tree, draw_nothing, read_steps, train

from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.launch.rank import train_main

pytestmark = pytest.mark.timeout(240)


def test_ranks_that_are_left_go_on_in_the_layout_that_fits_them_and_the_others_wait(trio: Path, tmp_path: Path) -> None:
    tree = config_tree(trio, tmp_path / "runs", COLOCATED_TP2 | {"dp": 2})
    tree["layouts"] += [COLOCATED_TP2]  # of the three ranks that are left, one waits
    tree |= {"device": "cpu", "checkpoint": {"every": 1, "keep": 20}}
    whole = train(tree, 4)
    fewer = whole.with_name("fewer")
    shutil.copytree(whole, fewer)
    for progress, path in list_checkpoints(fewer / "checkpoints"):
        if progress > Progress(2, 1):
            shutil.rmtree(path)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree | {"name": "fewer"}, sort_keys=False))

    codes, said = launch(_elastic_rank, tmp_path, tmp_path / "c.yaml")
    assert codes == [0] * RANKS, said
    mine, theirs = read_steps(fewer), read_steps(whole)
    assert mine[:3] == theirs[:3] and mine[3:] != theirs[3:]
    for one, other in zip(mine, theirs, strict=True):
        assert [one[key] for key in ("step", "tokens", "processed_tokens")] == [
            other[key] for key in ("step", "tokens", "processed_tokens")
        ]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


def _elastic_rank(config_path: Path) -> int:
    draw_nothing()
    return train_main(config_path, [], resume=False, elastic=True)
