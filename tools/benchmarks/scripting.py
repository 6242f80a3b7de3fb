"""What the scripts of this folder share: arguments refused in one line before any work, results written whole."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ultrafuser_mega.errors import EXIT_BAD_INPUT

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Parser(argparse.ArgumentParser):
    """Prints the docstring it is given as it stands; a bad argument ends the script with one line and exit code 2."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message}\n")


def positive(text: str) -> int:
    """Type of an argument that counts something."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: needed a whole number of at least 1")
    return number


def result_file(text: str) -> Path:
    """Type of an argument that names a file to write: its folder must be there and take one."""
    path = Path(text)
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"{text}: is not a regular file; name a file to write")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.parent}; create it or name another")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = f"{text}: no file can be written in {path.parent} ({error.strerror}); name another folder"
        raise argparse.ArgumentTypeError(reason) from None
    return path


def write_json(path: Path, report: Any) -> None:
    write_text(path, json.dumps(report, indent=1) + "\n")


def write_figure(path: Path, figure: Figure) -> None:
    unfinished = path.with_name(f"{path.stem}.tmp{path.suffix}")  # the suffix says what to write
    figure.savefig(unfinished, dpi=120)
    unfinished.replace(path)


def write_text(path: Path, text: str) -> None:
    """The file appears under its name when it is whole."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text)
    unfinished.replace(path)
