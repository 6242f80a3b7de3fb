"""What needs no model is answered without the libraries that take seconds to import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "megatron", "transformers", "tensorboard", "matplotlib", "numpy"}
COMMANDS = (
    "doctor",
    "clean",
    "look",
    "synthesize",
    "plan",
    "prepare",
    "slurm",
    "train",
    "report",
    "import",
    "export",
    "verify",
    "generate",
    "chat",
)
# Runs commands one after the other, as long as they import none of the heavy ones: a line of those behind each.
PROGRAM = f"""
import json, sys
from ultrafuser_mega.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit:
        pass
    heavy = sorted({HEAVY} & set(sys.modules))
    print("imported", json.dumps(heavy), flush=True)
    if heavy:
        break
"""


def run(*commands: tuple[object, ...]) -> list[tuple[list[str], str]]:
    """Of every ``ultrafuser arguments...`` the heavy modules that it imported, and what it wrote."""
    command = [sys.executable, "-c", PROGRAM, json.dumps([[str(word) for word in words] for words in commands])]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=True)
    found, text = [], ""
    for line in done.stdout.splitlines(keepends=True):
        if line.startswith("imported "):
            found.append((json.loads(line.removeprefix("imported ")), text))
            text = ""
        else:
            text += line
    return found


def test_help_imports_none() -> None:
    commands = [("--help",), *((command, "--help") for command in COMMANDS)]
    for words, (imported, text) in zip(commands, run(*commands), strict=True):
        assert imported == [] and text.startswith("Usage: "), words


@pytest.mark.parametrize("command", ["plan", "prepare", "train"])
def test_a_wrong_configuration_is_refused_without_them(command: str) -> None:
    errors = {
        ("--config", "gone.yaml"): "error: --config gone.yaml: no such file\n",
        ("stage2.step=5",): "error: the embedded default: unknown key stage2.step; did you mean stage2.steps?\n",
        ("dtype=fp8",): "error: the embedded default: dtype: Input should be 'fp32' or 'bf16' (found 'fp8')\n",
    }
    answers = run(*((command, *arguments) for arguments in errors))
    for error, (imported, text) in zip(errors.values(), answers, strict=True):
        assert imported == [] and error in text


def test_so_is_a_wrong_configuration_to_import(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: [")
    words = (("import", tmp_path / "run.yaml", tmp_path / "out"), ("import", tmp_path, tmp_path / "out", "seed=3"))
    (imported, text), (imported_then, text_then) = run(*words)
    assert imported == imported_then == [] and "run.yaml: not valid YAML: " in text
    assert "error: seed=3: overrides belong to a configuration" in text_then


def test_so_are_options_that_exclude_each_other() -> None:
    answers = run(("verify", "a", "b", "--tp", 2), ("generate", "model", "hi", "--raw", "--system", "x"))
    assert [(imported, "error: --" in text) for imported, text in answers] == [([], True)] * 2
