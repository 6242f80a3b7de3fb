"""Is a release folder whole? Asked before it is loaded, since transformers fills what is missing with noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers import PreTrainedTokenizerFast as FastTokenizer

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.hf_folder import (
    Architecture,
    TensorFolder,
    hf_shapes,
    parse_architecture,
    read_json_object,
)
from ultrafuser_mega.release.configuration_ultrafuser import UltraFuserConfig

_DEFAULTS: dict[str, Any] = {
    "gate_shared": UltraFuserConfig.gate_shared,
    "response_lead": UltraFuserConfig.response_lead,
}


def is_release(folder: Path) -> bool:
    """Whether ``folder`` calls itself a release; raises InputError where its config.json is damaged."""
    path = folder / "config.json"
    return path.is_file() and _read_object(path).get("model_type") == UltraFuserConfig.model_type


def check_release(folder: Path) -> UltraFuserConfig:
    """Refuse a release folder that would be loaded as another model than was written.

    Args:
        folder: of a release; weights are not read, only the headers of their files.

    Returns:
        Its configuration.

    Raises:
        InputError: config.json, generation_config.json or a tokenizer is missing or damaged, or the tensors are not
            exactly those that the configuration calls for; names the file and the field or tensor.
    """
    path = folder / "config.json"
    fields = _DEFAULTS | _read_object(path)  # transformers leaves out what is as by default
    entries = _entries(path, fields)
    archs = {
        name: parse_architecture(Path(f"{path}: specialists.{name}.config"), entry["config"])
        for name, entry in entries.items()
    }
    _check_sizes(path, fields, archs)
    try:
        config = UltraFuserConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds
        raise InputError(f"{path}: cannot be read ({_first_line(error)}); copy it again") from None
    TensorFolder(folder).check(_shapes(archs, fields["gate_units"], fields["gate_shared"]))
    for place in dict.fromkeys(["", *(entry.get("tokenizer", "") for entry in entries.values())]):
        _check_tokenizer(folder / place)
    _check_generation(folder / "generation_config.json", fields["vocab_size"])
    return config


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """While a model is made of ``folder``, what transformers says of damaged files becomes one line.

    Raises:
        InputError: that.
    """
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError, OSError) as error:
        raise InputError(f"{folder}: cannot be loaded ({_first_line(error)}); copy it again") from None


def _entries(path: Path, fields: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> entry of the field ``specialists``."""
    given = fields.get("specialists")
    if not isinstance(given, list) or not given:
        raise InputError(f"{path}: specialists = {given!r}; expected a list of one entry for each specialist")
    entries: dict[str, dict[str, Any]] = {}
    for place, entry in enumerate(given):
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name or name in entries:
            raise InputError(f"{path}: specialists[{place}].name = {name!r}; expected a name of its own")
        for field in ("config", "template"):
            if not isinstance(entry.get(field), dict):
                raise InputError(f"{path}: specialists.{name}.{field} = {entry.get(field)!r}; expected an object")
        template = entry["template"]
        pieces = ("chat_template",) if "chat_template" in template else ("first", "later")
        for piece in pieces:
            if not isinstance(template.get(piece), str):
                raise InputError(
                    f"{path}: specialists.{name}.template.{piece} = {template.get(piece)!r}; expected a text"
                )
        if not isinstance(entry.get("tokenizer", ""), str):
            raise InputError(f"{path}: specialists.{name}.tokenizer = {entry['tokenizer']!r}; expected a subfolder")
        entries[name] = entry
    return entries


def _check_sizes(path: Path, fields: Mapping[str, Any], archs: Mapping[str, Architecture]) -> None:
    for field in ("vocab_size", "gate_units"):
        if type(fields.get(field)) is not int or fields[field] < 1:
            raise InputError(f"{path}: {field} = {fields.get(field)!r}; expected a positive whole number")
    if not isinstance(fields["gate_shared"], bool):
        raise InputError(f"{path}: gate_shared = {fields['gate_shared']!r}; expected true or false")
    if not isinstance(fields["response_lead"], str):
        raise InputError(f"{path}: response_lead = {fields['response_lead']!r}; expected a text")
    if fields.get("quantization_config") is not None:
        raise InputError(f"{path}: quantization_config is not supported; remove it")
    smallest = min(archs, key=lambda name: archs[name].vocab_rows)
    if fields["vocab_size"] > archs[smallest].vocab_rows:
        raise InputError(
            f"{path}: vocab_size = {fields['vocab_size']} is more than the {archs[smallest].vocab_rows} rows of "
            f"specialists.{smallest}"
        )
    widths = {name: arch.hidden_size for name, arch in archs.items()}
    if fields["gate_shared"] and len(set(widths.values())) > 1:
        raise InputError(f"{path}: gate_shared = true, but hidden sizes differ ({widths})")


def _shapes(archs: Mapping[str, Architecture], units: int, shared: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor of a release -> its shape (see ``assemble``)."""
    widths = {name: arch.hidden_size for name, arch in archs.items()}
    first = {"shared": next(iter(widths.values()))} if shared else widths
    return {
        **{
            f"specialists.{name}.{key}": shape for name, arch in archs.items() for key, shape in hf_shapes(arch).items()
        },
        **{f"gate.w1.{name}": (units, width) for name, width in first.items()},
        "gate.b1": (units,),
        "gate.w2": (units,),
    }


def _check_tokenizer(folder: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        _read_object(folder / file)
    try:
        tokenizer = FastTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers and transformers raise many kinds, pyo3 its own
        raise InputError(f"{folder / 'tokenizer.json'}: damaged ({_first_line(error)}); copy it again") from None
    if tokenizer.eos_token_id is None:
        raise InputError(f"{folder / 'tokenizer_config.json'}: eos_token is missing or not in tokenizer.json")


def _check_generation(path: Path, vocab_size: int) -> None:
    ends = _read_object(path).get("eos_token_id")
    tokens = ends if isinstance(ends, list) else [ends]
    if not tokens or any(type(token) is not int or not 0 <= token < vocab_size for token in tokens):
        raise InputError(f"{path}: eos_token_id = {ends!r}; expected tokens of the vocabulary of {vocab_size}")
    try:
        GenerationConfig.from_pretrained(path.parent, local_files_only=True)
    except Exception as error:  # a field that transformers refuses
        raise InputError(f"{path}: cannot be read ({_first_line(error)}); copy it again") from None


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"{path}: missing; copy the folder again")
    return read_json_object(path)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
