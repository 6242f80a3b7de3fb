"""What is wrong with a configuration, in one line that names the key and what was perhaps meant."""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import ValidationError

from ultrafuser_mega.config.fuser import FuserConfig
from ultrafuser_mega.config.section import Section

_EVERY_SPECIALIST = (
    "a disjoint layout gives every specialist its own ranks, as in specialists: {text: {tp: 2}, code: {tp: 1, pp: 2}}"
)
_NUMBERS = {
    "float_parsing": "number",
    "float_type": "number",
    "int_parsing": "whole number",
    "int_type": "whole number",
    "int_from_float": "whole number",
}


def first_problem(error: ValidationError, of: type[Section] = FuserConfig) -> str:
    """The one to mend first, in a configuration of this kind."""
    # A misspelt key usually comes with "missing" for the right one; the spelling is what to mend.
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    kind, value = problem["type"], problem.get("input")
    where = ".".join(str(part) for part in problem["loc"] if part not in ("disjoint", "colocated"))
    if kind == "extra_forbidden":
        return f"unknown key {where}{_suggestion(where, of)}"
    if kind == "missing":
        shown = f"; {_EVERY_SPECIALIST}" if "disjoint" in problem["loc"] and where.endswith(".specialists") else ""
        return f"{where} is missing; it has no default{shown}"
    if kind == "union_tag_not_found":
        return f"{where}.kind is missing; use disjoint or colocated"
    if kind == "union_tag_invalid":
        return f"{where}.kind is {value['kind']!r}; use disjoint or colocated"
    if kind in _NUMBERS:
        return f"{where}: expected a {_NUMBERS[kind]} (found {value!r})"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{where}: expected keys and values (found {value!r})"
    if kind in ("string_type", "path_type") and isinstance(value, int | float | datetime.date):
        return f"{where}: YAML makes {value} of what stands there unquoted; put it in quotes: '\"...\"' in a command"
    message = problem["msg"].removeprefix("Value error, ")
    secret = where.rpartition(".")[2] == "key"  # it names a variable, but some put there what the variable holds
    shown = f" (found {value!r})" if where and not isinstance(value, dict | list) and not secret else ""
    return f"{where}: {message}{shown}" if where else message


def _suggestion(unknown: str, of: type[Section]) -> str:
    """The keys that were perhaps meant: of the nearest spelling, in the same section if it has one."""
    known = [(section.split("."), name) for section, _, name in (key.rpartition(".") for key in _keys(of))]
    *section, last = unknown.split(".")
    close = difflib.get_close_matches(last, {name for _, name in known}, n=1)
    meant = [place for place, name in known if name in close]
    here = ".".join([*section, *close])
    if section and here == unknown:  # known, but of another kind of layout
        shown = f": {_EVERY_SPECIALIST}" if last in ("tp", "pp") else ""
        return f"; {'.'.join(section)} is of a kind that has none{shown}"
    if any(_is_section(place, section) for place in meant):
        return f"; did you mean {here}?"
    nearest = min(map(len, meant), default=0)  # a key of a stage rather than of one of its parts
    elsewhere = dict.fromkeys(".".join([*place, *close]).removeprefix(".") for place in meant if len(place) == nearest)
    return f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else ""


def _is_section(pattern: list[str], section: list[str]) -> bool:
    section = section or [""]
    return len(pattern) == len(section) and all(p in ("*", s) for p, s in zip(pattern, section, strict=True))


def _keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Every key there is, as in stage1.steps; "*" stands for a name or an index."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner, many in _sections_in(field.annotation):
            yield from _keys(inner, f"{prefix}{name}.*." if many else f"{prefix}{name}.")


def _sections_in(annotation: Any, many: bool = False) -> Iterator[tuple[type[Section], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, many
    either = get_origin(annotation) in (Union, UnionType)  # a section or nothing
    for argument in get_args(annotation):
        yield from _sections_in(argument, many or not either)
