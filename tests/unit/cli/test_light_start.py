"""What needs no model is answered without the libraries that take seconds to import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "megatron", "transformers", "tensorboard", "matplotlib", "numpy"}
COMMANDS = ("doctor", "plan", "prepare", "slurm", "train", "import", "export", "verify", "generate", "chat")
# Of a process that ran a command: the heavy ones among its modules, as its last line.
PROGRAM = f"""
import json, sys
from ultrafuser_mega.cli import main
try:
    main()
except SystemExit:
    pass
print(json.dumps(sorted({HEAVY} & set(sys.modules))))
"""


def run(*arguments: object) -> tuple[list[str], str]:
    """The heavy modules that ``ultrafuser arguments...`` imported, and what it wrote."""
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def test_help_imports_none() -> None:
    assert run("--help")[0] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_imports_none(command: str) -> None:
    imported, text = run(command, "--help")
    assert imported == [] and text.startswith("Usage: ")


@pytest.mark.parametrize("command", ["plan", "prepare", "train"])
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--config", "gone.yaml"), "error: --config gone.yaml: no such file\n"),
        (("stage2.step=5",), "error: the embedded default: unknown key stage2.step; did you mean stage2.steps?\n"),
        (("dtype=fp8",), "error: the embedded default: dtype: Input should be 'fp32' or 'bf16' (found 'fp8')\n"),
    ],
    ids=["no file", "unknown key", "wrong value"],
)
def test_a_wrong_configuration_is_refused_without_them(command: str, arguments: tuple[str, ...], error: str) -> None:
    imported, text = run(command, *arguments)
    assert imported == [] and error in text


def test_so_is_a_wrong_configuration_to_import(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: [")
    imported, text = run("import", tmp_path / "run.yaml", tmp_path / "out")
    assert imported == [] and "run.yaml: not valid YAML: " in text
    imported, text = run("import", tmp_path, tmp_path / "out", "seed=3")
    assert imported == [] and "error: seed=3: overrides belong to a configuration" in text


def test_so_are_options_that_exclude_each_other() -> None:
    for arguments in (("verify", "a", "b", "--tp", 2), ("generate", "model", "hi", "--raw", "--system", "x")):
        imported, text = run(*arguments)
        assert imported == [] and "error: --" in text
