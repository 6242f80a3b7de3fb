"""Prompts: Jinja files, one for each step, in a folder for each kind of class.

A shipped folder holds what is other than in ``prompts/general``, and so may one's own, whose files can begin with
``{% extends "general/instructions.jinja" %}``. A comment ``{# version: 2 #}`` is part of the ledger's keys.
"""

from __future__ import annotations

import re
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.synthesis.config import SHIPPED, STEPS

_VERSION = re.compile(r"\{#-?\s*version:\s*(\S+)")


class Templates:
    """The prompts of a class.

    Args:
        prompts: general, text, code, math, or a folder.

    Raises:
        InputError: there is no such folder, or a file is no template.
    """

    def __init__(self, prompts: str) -> None:
        self._name = prompts
        shipped = Path(str(resources.files("ultrafuser_mega.synthesis"))) / "prompts"
        self._own = shipped / prompts if prompts in SHIPPED else Path(prompts)
        if not self._own.is_dir():
            raise InputError(f"prompts: {prompts} is no folder, and none of {', '.join(SHIPPED)}, which are shipped")
        unknown = {path.stem for path in self._own.glob("*.jinja")} - set(STEPS)
        if unknown:
            raise InputError(f"{self._own}/{min(unknown)}.jinja: there is no such step; use {', '.join(STEPS)}")
        self._shipped = shipped

    @cached_property
    def _environment(self) -> jinja2.Environment:
        folders = jinja2.FileSystemLoader([self._own, self._shipped / "general", self._shipped])
        return jinja2.Environment(
            loader=folders, undefined=jinja2.StrictUndefined, keep_trailing_newline=False, autoescape=False
        )

    def render(self, step: str, **values: Any) -> str:
        """The prompt of a step."""
        try:
            return self._environment.get_template(f"{step}.jinja").render(**values).strip()
        except jinja2.TemplateError as error:
            where = getattr(error, "name", None) or f"{step}.jinja"
            raise InputError(f"prompts {self._name}: {where}: {' '.join(str(error).split())}") from None

    def version(self, step: str) -> str:
        """Of the file of a step."""
        file = self._own / f"{step}.jinja"
        file = file if file.is_file() else self._shipped / "general" / file.name
        found = _VERSION.search(file.read_text(encoding="utf-8"))
        return found[1] if found else "1"
