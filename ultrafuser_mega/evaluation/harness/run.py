"""lm-evaluation-harness's own command, with our model class and our tasks on local files."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from ultrafuser_mega.errors import InputError

NOT_INSTALLED = "lm-evaluation-harness is not installed; pip install 'ultrafuser_mega[lm-eval]'"

_PLACE = "{data}"


def run_harness(arguments: Sequence[str], data: Path | None) -> None:
    """``lm_eval ARGUMENTS``, where ``--model ultrafuser`` is known and, with ``data``, the tasks ``ultrafuser_*``.

    Args:
        arguments: of lm_eval.
        data: the folder with the benchmarks' files as published.

    Raises:
        InputError: the harness is not installed.
    """
    if find_spec("lm_eval") is None:
        raise InputError(f"lm-eval: {NOT_INSTALLED}")
    if data is not None and not data.is_dir():
        raise InputError(f"--data {data}: no such folder; expected that of the benchmarks' files")
    with TemporaryDirectory(prefix="ultrafuser-tasks-") as folder:
        given = list(arguments)
        if data is not None:
            write_tasks(data, Path(folder))
            given += ["--include_path", folder]
        from lm_eval.__main__ import cli_evaluate

        import ultrafuser_mega.evaluation.harness.model  # noqa: F401 (registers the class)

        sys.argv = ["lm_eval", *given]
        cli_evaluate()


def write_tasks(data: Path, folder: Path) -> None:
    """The tasks' files into ``folder``, each of which reads its rows in ``data``."""
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # the files are here
    for entry in (files("ultrafuser_mega.evaluation.harness") / "tasks").iterdir():
        if entry.name.endswith((".yaml", ".py")):
            text = entry.read_text(encoding="utf-8")
            (folder / entry.name).write_text(text.replace(_PLACE, str(data.resolve())), encoding="utf-8")
