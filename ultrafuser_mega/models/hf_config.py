"""What a specialist's config.json says, read as transformers reads it.

transformers' own configuration class of the family resolves the fields: which of two spellings of one setting counts,
and what a field means that is not there. What is left to do here is to refuse what transformers' model code reads and
this package does not compute. A field that neither the family's class has nor shared code looks up (``_LOOKED_UP``)
cannot change a logit, whatever its name (``unread_fields``).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import logging

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.families import FAMILIES, Architecture, Family, LinearScaling, Llama3Scaling

# Fields that every family's class has -> the values that are computed here; () for any value: those that are read
# below, and those without effect on the logits.
_FIELDS: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish"), "attention_dropout": (0,)} | dict.fromkeys(
    (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "layer_types"),
        *("tie_word_embeddings", "initializer_range", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
    ),
    (),
)
# What code that transformers' models share looks up in any configuration -> the values with which it changes nothing.
_LOOKED_UP: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "transformers_weights": (None,),
    "per_layer_config": (None,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "attention_chunk_size": (None,),
    "kv_sharing_modes": (None,),
    "return_dict": (True,),  # with false transformers' own causal models fail
}
# Older spellings that transformers resolves, and notes of the software that wrote the file.
_OTHER_NAMES = frozenset({"rope_scaling", "rope_theta", "torch_dtype", "auto_map"})
_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Kinds of rotary positions -> the numbers that each needs.
_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_architecture(folder: Path) -> Architecture:
    """Architecture of the model in ``folder``.

    Raises:
        InputError: no config.json, another model family, or a field whose effect is not computed here.
    """
    return parse_architecture(folder / "config.json", _read_config(folder))


def read_json_object(path: Path) -> dict[str, Any]:
    """The fields of a JSON file of a Hugging Face folder.

    Raises:
        InputError: it cannot be read, is no JSON or no object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); copy it again") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path}: holds a {type(fields).__name__}; expected a JSON object of fields")
    return fields


def parse_architecture(path: Path, config: dict[str, Any]) -> Architecture:
    """Architecture of the fields of a config.json; ``path`` is where they stand, for messages.

    Raises:
        InputError: another model family, or a field whose effect is not computed here.
    """
    family = _family(path, config)
    _refuse_unsupported(path, config, family)
    resolved = _resolve(path, config)
    hidden_size, heads = _size(path, resolved, "hidden_size"), _size(path, resolved, "num_attention_heads")
    kv_heads = _size(path, resolved, "num_key_value_heads")
    if heads % kv_heads:
        raise InputError(f"{path}: num_key_value_heads = {kv_heads} does not divide num_attention_heads = {heads}")
    theta, scaling = _rope(path, config, resolved)
    window = _size(path, resolved, "sliding_window") if _value(resolved, "sliding_window") is not None else None
    for kind in _value(resolved, "layer_types") or []:
        # A window that all sequences fit into (check_positions) changes nothing.
        if kind != "full_attention" and not (kind == "sliding_attention" and window is not None):
            _refuse(path, "layer_types", kind, ("full_attention",))
    return Architecture(
        family=family.model_type,
        layers=_size(path, resolved, "num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_size=_size(path, resolved, "intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_size(path, resolved, "head_dim")
        if _value(resolved, "head_dim") is not None
        else hidden_size // heads,
        vocab_rows=_size(path, resolved, "vocab_size"),
        max_positions=_size(path, resolved, "max_position_embeddings"),
        norm_eps=_number(path, "rms_norm_eps", _value(resolved, "rms_norm_eps"), may_be_zero=True),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=window,
        tied=bool(resolved.tie_word_embeddings),
    )


def unread_fields(folder: Path) -> list[str]:
    """What the config.json says that has no effect: neither here nor in transformers, in sentences for people.

    Raises:
        InputError: no config.json, or another model family.
    """
    path, config = folder / "config.json", _read_config(folder)
    family = _family(path, config)
    known = {*_class_defaults(family), *PreTrainedConfig().to_dict(), *_accepted(family), *_OTHER_NAMES}
    notices = []
    if unread := [field for field, value in config.items() if field not in known and value is not None]:
        notices.append(f"{path}: no effect, as in transformers: {', '.join(unread)}")
    if config.get("rope_scaling") and config.get("rope_parameters"):
        notices.append(f"{path}: rope_parameters has no effect beside rope_scaling, as in transformers")
    return notices


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; expected a Hugging Face model folder with config.json and safetensors"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: has no config.json; expected a Hugging Face model folder")
    return read_json_object(path)


def _family(path: Path, config: Mapping[str, Any]) -> Family:
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        _refuse(path, "model_type", config.get("model_type"), tuple(FAMILIES))
    return family


def _accepted(family: Family) -> dict[str, tuple[Any, ...]]:
    return _LOOKED_UP | _FIELDS | dict(family.accepts)


def _class_defaults(family: Family) -> dict[str, Any]:
    """Every field of transformers' configuration class of the family that not all models have -> its default."""
    everything, shared = CONFIG_MAPPING[family.model_type]().to_dict(), PreTrainedConfig().to_dict()
    return {field: value for field, value in everything.items() if field not in shared}


def _refuse_unsupported(path: Path, config: Mapping[str, Any], family: Family) -> None:
    for field in _REQUIRED:
        if config.get(field) is None:
            raise InputError(f"{path}: lacks the field {field}")
        _check_size(path, field, config[field])
    for field, choices in _accepted(family).items():
        if choices and field in config and config[field] not in choices:
            _refuse(path, field, config[field], choices)
    defaults = _class_defaults(family)
    for field in defaults.keys() & config.keys() - _accepted(family).keys():  # of a transformers newer than this list
        if config[field] != defaults[field]:
            _refuse(path, field, config[field], (defaults[field],))
    for field in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(field), dict | None):
            _refuse(path, field, config[field], (None,))
    if not isinstance(config.get("layer_types"), list | None):
        _refuse(path, "layer_types", config["layer_types"], ("a list of full_attention",))


def _resolve(path: Path, config: Mapping[str, Any]) -> PreTrainedConfig:
    try:
        with _quiet():  # the same words from every rank, about what is refused here or has no effect
            return CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
    except Exception as error:  # transformers and its validation raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: transformers refuses it: {reason}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _rope(
    path: Path, config: Mapping[str, Any], resolved: PreTrainedConfig
) -> tuple[float, LinearScaling | Llama3Scaling | None]:
    """Base of the rotary frequencies, and how they are stretched."""
    rope: dict[str, Any] = resolved.rope_parameters
    given = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"  # transformers' order
    kind = rope.get("rope_type")
    if kind not in _ROPE_FIELDS:
        _refuse(path, f"{given}.rope_type", kind, tuple(_ROPE_FIELDS))
    if (part := rope.get("partial_rotary_factor", 1)) != 1:
        _refuse(path, f"{given}.partial_rotary_factor", part, (1,))
    theta = _number(path, "rope_theta", rope.get("rope_theta"))
    values = [_number(path, f"{field} of the {kind} rope scaling", rope.get(field)) for field in _ROPE_FIELDS[kind]]
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearScaling(*values)
    factor, low, high, original = values
    if low >= high:
        raise InputError(f"{path}: {given}: low_freq_factor = {low:g} must be less than high_freq_factor = {high:g}")
    return theta, Llama3Scaling(factor, low, high, int(original))


def _value(resolved: PreTrainedConfig, field: str) -> Any:
    return getattr(resolved, field, None)


def _size(path: Path, resolved: PreTrainedConfig, field: str) -> int:
    value = _value(resolved, field)
    _check_size(path, field, value)
    return int(value)


def _check_size(path: Path, field: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise InputError(f"{path}: {field} = {value!r}; expected a positive whole number")


def _number(path: Path, field: str, value: Any, *, may_be_zero: bool = False) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (value > 0 or (may_be_zero and value == 0)):
        raise InputError(
            f"{path}: {field} = {value!r}; expected a {'number from 0 on' if may_be_zero else 'positive number'}"
        )
    return float(value)


def _refuse(path: Path, field: str, value: Any, choices: tuple[Any, ...]) -> NoReturn:
    allowed = " or ".join(repr(choice) for choice in choices if choice is not None) or "no value"
    raise InputError(f"{path}: {field} = {value!r} is not supported; supported: {allowed}")
