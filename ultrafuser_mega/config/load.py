"""YAML file -> ``key.sub=value`` overrides -> validated objects."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from ultrafuser_mega.config.fuser import FuserConfig
from ultrafuser_mega.config.problems import first_problem
from ultrafuser_mega.config.section import Section
from ultrafuser_mega.errors import InputError

Kind = TypeVar("Kind", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, where PyYAML lets the last one win; and 10:12 is no number.

    YAML 1.1 counts 10:12 in sixties, as 612; YAML 1.2 does not.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):  # refused below
                continue
            key = key_node.value
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> Any:
        return node.value if ":" in node.value else super().construct_yaml_int(node)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> Any:
        return node.value if ":" in node.value else super().construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def default_config_text() -> str:
    """The embedded default: toy specialists, a layout for 1, 2, 3, 4, 6 and 8 ranks."""
    return resources.files("ultrafuser_mega.config").joinpath("default.yaml").read_text()


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> FuserConfig:
    """Read a YAML file (None: the embedded default), apply ``key.sub=value`` overrides, validate.

    Raises:
        InputError: the file, an override or a value is wrong; one line that names the key.
    """
    if path is None:
        return parse_config(FuserConfig, "the embedded default", default_config_text(), overrides)
    return read_config(FuserConfig, path, overrides)


def read_config(kind: type[Kind], path: Path, overrides: Sequence[str] = ()) -> Kind:
    """What :func:`load_config` does, for a configuration of any kind that is in a file."""
    if not path.is_file():
        raise InputError(f"--config {path}: {'a folder; give a YAML file' if path.is_dir() else 'no such file'}")
    return parse_config(kind, str(path), path.read_text(encoding="utf-8", errors="replace"), overrides)


def parse_config(kind: type[Kind], source: str, text: str, overrides: Sequence[str] = ()) -> Kind:
    """The same, of ``text`` that came from ``source``."""
    tree = parse_yaml(source, text)
    if not isinstance(tree, dict):
        raise InputError(f"{source}: expected keys and values at the top level")
    for override in overrides:
        _apply(tree, override)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{source}: {first_problem(error, kind)}") from None


def parse_yaml(source: str, text: str) -> Any:
    """YAML in which no key stands twice.

    Raises:
        InputError: it is none.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2024-13-45 is a date to PyYAML, and none to Python
        raise InputError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def dump_config(config: Section) -> str:
    """YAML that :func:`load_config` or :func:`read_config` reads back to the same object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"override {override!r}: expected key.sub=value, as in stage1.steps=100")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    node: Any = tree
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        step = _step(node, parents[:depth], part, override)
        if isinstance(node, dict) and node.get(step) is None:
            node[step] = {}
        node = node[step]
    node[_step(node, parents, last, override)] = value


def _step(node: Any, parents: list[str], part: str, override: str) -> str | int:
    """The key of a section or the index of a list that ``part`` means in ``node``."""
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise InputError(f"override {override!r}: {'.'.join(parents)} is a value, not a section")
    if not part.isdigit() or int(part) >= len(node):
        raise InputError(f"override {override!r}: {part} is not an index below {len(node)}")
    return int(part)
