"""tools/reproduce_paper.py at the smallest size: every table is made, and a second start runs nothing again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.branched import branched_tree, write_branched

from ultrafuser_mega.errors import EXIT_BAD_INPUT
from ultrafuser_mega.toy.checkable import make_tasks, write_tasks


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_reproduction_runs_end_to_end_and_goes_on(tmp_path: Path) -> None:
    root = write_branched(tmp_path / "trio")
    for name in ("text", "code", "math"):
        write_tasks(root / "data" / f"{name}.tasks.jsonl", make_tasks(name, seed=0, rows=2, taken=()))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(branched_tree(root, tmp_path / "runs")))
    command = [sys.executable, "tools/reproduce_paper.py", "--quick", "--out", str(tmp_path / "out"), "--jobs", "2"]
    command += ["--config", str(config), "--base", str(root / "base"), "--tasks", str(root / "data")]
    command += ["stage1.steps=3", "stage2.steps=3", "stage1.warmup_steps=0", "stage2.warmup_steps=0"]

    def start(*options: str, code: int = 0) -> str:
        environment = os.environ | {"TERM": "dumb"}
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=700, env=environment)
        assert done.returncode == code, done.stderr
        return done.stderr

    assert "seed-0: no such folder; nothing was run for seed 0" in start("--so-far", code=EXIT_BAD_INPUT)
    start()
    out = tmp_path / "out"
    page = (out / "results.md").read_text()
    for title in ("Table 1: held-out loss", "Table 1: accuracy", "Table 2", "Table 3", "Table 4", "Table 6", "Table 8"):
        assert f"## {title}" in page
    document = json.loads((out / "claims.json").read_text())
    assert not document["left_out"]
    assert {"text", "text + FT", "average", "task arithmetic", "BTX", "FuseChat", "LlamaFuser", "UltraFuser"} <= set(
        document["losses"]
    )
    assert len(document["losses"]["UltraFuser"]["mean"]) == 2
    assert all(path.is_file() for path in out.glob("plots/figure_*.png")) and len([*out.glob("plots/*.png")]) == 3
    again = start()
    assert "runs: " in again and " min left" not in again and " s left" not in again

    decided = document["claims"]
    (out / "seed-1" / "models" / "btx" / "summary.json").unlink()
    start("--so-far")  # the page of what is there
    document = json.loads((out / "claims.json").read_text())
    assert document["left_out"] == {"BTX": "not run with every seed"} and "BTX" not in document["losses"]
    about_others = [claim for claim in decided if "BTX" not in claim["why"] + claim["claim"]]
    assert len(about_others) > 20 and all(claim in document["claims"] for claim in about_others)
