"""tools/compare_variants.py on the smallest toys: students are trained, asked the tasks, and both tables are made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_SMALL = """
import sys
from reproduction import trios
from reproduction.compare import Comparing, compare_students
from ultrafuser_mega.toy import ToyRecipe
trios._RECIPE = ToyRecipe(
    hidden_size=32, layers=2, train_rows=120, heldout_rows=10, task_rows=2, steps=3, branched=True, branch_steps=2
)
rows = "labels alone@1e-3,own then on-policy@2e-3"
settings = ["stage1.steps=2", "stage2.steps=2", "stage1.warmup_steps=0", "stage2.warmup_steps=0"]
settings += ["stage1.samples_per_class=2", "stage2.samples_per_class=2"]
if __name__ == "__main__":
    from pathlib import Path
    compare_students(Comparing.of(Path(sys.argv[1]), "0", True, None, rows, 2, settings, "text", None, 4))
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_students_are_compared_end_to_end(tmp_path: Path) -> None:
    program = tmp_path / "small.py"
    program.write_text(_SMALL)
    tools = Path(__file__).resolve().parents[2] / "tools"
    search = os.pathsep.join(filter(None, (str(tools), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(program), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": search, "TERM": "dumb"}

    done = subprocess.run(command, capture_output=True, text=True, timeout=1000, env=environment)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    document = json.loads((out / "students.json").read_text())
    rows = {"text", "code", "math", "average", "task arithmetic", "labels alone, 0.001", "own then on-policy, 0.002"}
    for table in ("losses", "accuracies"):
        assert rows | {"UltraFuser", "UltraFuser after stage 1"} <= set(document[table])
        assert all(len(own["mean"]) == 1 for own in document[table].values())
    assert "oracle of text, code, math" in document["accuracies"]
    page = (out / "students.md").read_text()
    assert page.count("| own then on-policy, 0.002 |") == 2 and "## Accuracy" in page
    run = out / "seed-0" / "runs" / "own-then-on-policy-0.002-4-steps"
    answers = [path.name for path in (run / "answers").glob("*.jsonl")]
    assert answers == ["on_policy-00000.jsonl"]  # before the third of four steps
