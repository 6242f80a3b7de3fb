"""Read a Hugging Face model folder: its architecture and slices of its tensors.

Nothing is loaded whole: the architecture comes from config.json, and every tensor is read by row or
column slice straight from safetensors, so each rank touches only the bytes it keeps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.families import FAMILIES, Architecture, LinearScaling, Llama3Scaling

__all__ = ["EMBEDDING", "FINAL_NORM", "HEAD", "Architecture", "HFWeights", "TensorFolder", "check_parallel_sizes"]

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_DERIVED = "rotary_emb.inv_freq"  # a buffer that old files store; rope_theta says the same

# What every family may say: field -> accepted values (None: absent); () for a field that is read below.
_FIELDS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "attention_dropout": (0, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
} | dict.fromkeys(
    (
        *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta"),
        *("rope_parameters", "rope_scaling", "tie_word_embeddings", "layer_types"),
    ),
    (),
)
# Kinds of rotary positions -> the numbers that each needs.
_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# What transformers and trainers write down beside, without effect on the logits.
_WITHOUT_EFFECT = frozenset(
    """
    _name_or_path _attn_implementation_autoset architectures auto_map transformers_version torch_dtype dtype use_cache
    initializer_range bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix
    id2label label2id num_labels finetuning_task task_specific_params problem_type return_dict output_hidden_states
    output_attentions torchscript use_bfloat16 tf_legacy_loss tie_encoder_decoder chunk_size_feed_forward is_decoder
    cross_attention_hidden_size max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens unsloth_version unsloth_fixed max_sequence_length _flash_attn_2_enabled is_llama_config
    """.split()  # noqa: SIM905 (one name a line would fill a page)
)


def read_architecture(folder: Path) -> Architecture:
    """Architecture of the model in ``folder``.

    Raises:
        InputError: no config.json, another model family, or a field that would be silently ignored.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; expected a Hugging Face model folder with config.json and safetensors"
        )
    if not path.is_file():
        raise InputError(f"{folder}: has no config.json; expected a Hugging Face model folder")
    return parse_architecture(path, read_json_object(path))


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
        InputError: another model family, or a field that would be silently ignored.
    """
    _refuse_unsupported(path, config)
    family = FAMILIES[config["model_type"]]
    config = {**family.defaults, **config}
    hidden_size, heads = _size(path, config, "hidden_size"), _size(path, config, "num_attention_heads")
    kv_heads = _size(path, config, "num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise InputError(f"{path}: num_key_value_heads = {kv_heads} does not divide num_attention_heads = {heads}")
    rope = _rope(config)
    windowed = config.get("use_sliding_window", True) and config.get("sliding_window") is not None
    return Architecture(
        family=family.model_type,
        layers=_size(path, config, "num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_size=_size(path, config, "intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_size(path, config, "head_dim", default=hidden_size // heads),
        vocab_rows=_size(path, config, "vocab_size"),
        max_positions=_size(path, config, "max_position_embeddings", default=2048),
        norm_eps=_number(path, config, "rms_norm_eps", 1e-6),
        rope_theta=_number(path, {**config, **rope}, "rope_theta", 1e4),
        rope_scaling=_rope_scaling(path, rope),
        sliding_window=_size(path, config, "sliding_window") if windowed else None,
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def _size(path: Path, config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = config.get(field)
    if value is None:
        value = default
    if value is None:
        raise InputError(f"{path}: lacks the field {field}")
    if type(value) is not int or value < 1:
        raise InputError(f"{path}: {field} = {value!r}; expected a positive whole number")
    return value


def _number(path: Path, config: Mapping[str, Any], field: str, default: float) -> float:
    value = config.get(field) or default
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InputError(f"{path}: {field} = {value!r}; expected a positive number")
    return float(value)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings: rope_parameters of transformers 5, or rope_scaling beside rope_theta before it."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope if isinstance(rope, dict) else {"rope_type": rope}


def _rope_type(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))  # "type" until transformers 4.43


def _rope_scaling(path: Path, rope: Mapping[str, Any]) -> LinearScaling | Llama3Scaling | None:
    kind = _rope_type(rope)
    values = []
    for field in _ROPE_FIELDS[kind]:
        value = rope.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise InputError(f"{path}: {field} of the {kind} rope scaling is {value!r}; expected a positive number")
        values.append(float(value))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(*values)
    factor, low, high, original = values
    return Llama3Scaling(factor, low, high, int(original))


def _refuse_unsupported(path: Path, config: dict[str, Any]) -> None:
    family = FAMILIES.get(str(config.get("model_type")))
    accepted = _FIELDS | dict(family.accepts) if family else {"model_type": tuple(FAMILIES)}
    for field, choices in accepted.items():
        if choices and config.get(field) not in choices:
            _refuse(path, field, config.get(field), choices)
    for field, value in config.items():
        if field not in accepted and field not in _WITHOUT_EFFECT and value is not None:
            raise InputError(
                f"{path}: {field} = {value!r} is not known for {config['model_type']} and might change what the model "
                "computes; remove the field if it does not"
            )
    for field in ("rope_parameters", "rope_scaling"):
        rope = config.get(field)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            _refuse(path, field, rope, (None,))
        if (kind := _rope_type(rope)) not in tuple(_ROPE_FIELDS):
            _refuse(path, f"{field}.rope_type", kind, tuple(_ROPE_FIELDS))
        _refuse_partial(path, field, rope)
    layer_types = config.get("layer_types") or []
    for kind in layer_types if isinstance(layer_types, list) else [layer_types]:
        # A window that all sequences fit into (check_positions) changes nothing.
        if kind != "full_attention" and not (kind == "sliding_attention" and config.get("sliding_window")):
            _refuse(path, "layer_types", kind, ("full_attention",))


def _refuse_partial(path: Path, field: str, rope: Mapping[str, Any]) -> None:
    if rope.get("partial_rotary_factor", 1) != 1:
        _refuse(path, f"{field}.partial_rotary_factor", rope["partial_rotary_factor"], (1,))


def _refuse(path: Path, field: str, value: Any, choices: tuple[Any, ...]) -> None:
    allowed = " or ".join(repr(choice) for choice in choices if choice is not None) or "no value"
    raise InputError(f"{path}: {field} = {value!r} is not supported; supported: {allowed}")


class TensorFolder:
    """The safetensors of a model folder, read by slice.

    Raises:
        InputError: a file is missing, truncated or not safetensors, or only pickle weights are there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            weight_map = _weight_map(index)
        elif (folder / "model.safetensors").is_file():
            weight_map = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        else:
            hint = "; pickle weights are not read, save the model as safetensors" if any(folder.glob("*.bin")) else ""
            raise InputError(f"{folder}: has neither model.safetensors nor model.safetensors.index.json{hint}")
        self._file_of = weight_map
        self._files = {name: self._open(name) for name in sorted(set(weight_map.values()))}
        for tensor, name in weight_map.items():
            if tensor not in self._files[name].keys():  # noqa: SIM118 (safe_open is no mapping)
                raise InputError(f"{index}: names {tensor} in {name}, which does not hold it")

    def _open(self, name: str):
        path = self.folder / name
        if not path.is_file():
            raise InputError(f"{path}: named by the index but missing")
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise InputError(f"{path}: truncated or damaged safetensors file ({error}); copy it again") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error}); check its permissions") from None

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._file_of

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a folder that does not hold exactly the tensors of ``shapes``.

        Raises:
            InputError: a tensor is missing, has another shape or is not called for; names the first.
        """
        for tensor, shape in shapes.items():
            if tensor not in self:
                raise InputError(f"{self.folder}: tensor {tensor} is missing from the safetensors files")
            found = tuple(self._slice(tensor).get_shape())
            if found != shape:
                raise InputError(f"{self.folder}: tensor {tensor} has shape {found}, config.json calls for {shape}")
            if not self.dtype(tensor).is_floating_point:
                raise InputError(
                    f"{self.folder}: tensor {tensor} is {self.dtype(tensor)}; expected fp32, bf16 or fp16 weights"
                )
        for tensor in self._file_of:
            if tensor not in shapes and not tensor.endswith(_DERIVED):
                raise InputError(f"{self.folder}: holds the tensor {tensor}, which config.json does not call for")

    def names(self) -> list[str]:
        """Names of all tensors but those that say again what config.json says."""
        return [tensor for tensor in self._file_of if not tensor.endswith(_DERIVED)]

    def dtype(self, tensor: str) -> torch.dtype:
        """Element type of a tensor, from its file's header."""
        return self._slice(tensor)[:0].dtype

    def read(self, tensor: str, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
        """``tensor[rows]`` or ``tensor[rows, columns]``."""
        view = self._slice(tensor)
        return view[rows] if columns is None else view[rows, columns]

    def _slice(self, tensor: str) -> Any:
        return self._files[self._file_of[tensor]].get_slice(tensor)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{index}: holds no weight_map; expected the index that save_pretrained writes") from None
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise InputError(f"{index}: weight_map names {file!r} for tensor {tensor}; expected the name of a file")
    return weight_map


class HFWeights:
    """Slices of a specialist's folder in the layout that Megatron-core's layers keep them (see ``families``).

    Raises:
        InputError: the folder cannot be read, or its tensors are not those of ``architecture``.
    """

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        self.arch = architecture
        self.tensors = TensorFolder(folder)
        # A tied model may still store its head.
        self._head = EMBEDDING if architecture.tied and HEAD not in self.tensors else HEAD
        shapes = hf_shapes(architecture)
        if self._head == EMBEDDING:
            del shapes[HEAD]
        self.tensors.check(shapes)

    def embedding(self, rows: slice) -> Tensor:  # (rows, d)
        """Rows of the input embedding."""
        return self.tensors.read(EMBEDDING, rows)

    def head(self, rows: slice) -> Tensor:  # (rows, d)
        """Rows of the output head; of the embedding where the model ties them."""
        return self.tensors.read(self._head, rows)

    def final_norm(self) -> Tensor:  # (d,)
        """Weight of the norm after the last layer."""
        return self.tensors.read(FINAL_NORM)

    def layer(self, index: int, tp_rank: int, tp: int) -> dict[str, Tensor]:
        """Tensor-parallel shard of decoder layer ``index`` under Megatron's parameter names."""

        def read(name: str, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
            return self.tensors.read(f"model.layers.{index}.{name}", rows, columns)

        rules = FAMILIES[self.arch.family].rules
        return {rule.parameter: rule.shard(self.arch, read, tp_rank, tp) for rule in rules}


def hf_shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of a folder, the output head included -> its shape."""
    d = a.hidden_size
    of_layer = {name: shape for rule in FAMILIES[a.family].rules for name, shape in rule.shapes(a).items()}
    layers = {f"model.layers.{i}.{name}": shape for i in range(a.layers) for name, shape in of_layer.items()}
    return {EMBEDDING: (a.vocab_rows, d), **layers, FINAL_NORM: (d,), HEAD: (a.vocab_rows, d)}


def check_positions(field: str, length: int, name: str, arch: Architecture) -> None:
    """Refuse sequences of ``length`` tokens, which ``field`` asks for, where the specialist computes fewer.

    Raises:
        InputError: names the field, the specialist and what limits it.
    """
    if length > arch.max_positions:
        raise InputError(
            f"{field}: {length} tokens are more than the {arch.max_positions} positions of specialist {name}"
        )
    if arch.sliding_window is not None and length > arch.sliding_window:
        raise InputError(
            f"{field}: {length} tokens are more than the sliding_window = {arch.sliding_window} of specialist {name}, "
            f"which is not computed here; use at most {arch.sliding_window}"
        )


def check_parallel_sizes(name: str, arch: Architecture, tp: int, pp: int) -> None:
    """Refuse tp and pp that do not divide the specialist's sizes.

    Raises:
        InputError: names the specialist, the size and the values that would work.
    """
    for what, size in (
        ("attention heads", arch.heads),
        ("key/value heads", arch.kv_heads),
        ("MLP width", arch.ffn_size),
    ):
        if size % tp:
            works = ", ".join(
                str(t) for t in range(1, arch.kv_heads + 1) if arch.kv_heads % t == 0 and arch.ffn_size % t == 0
            )
            raise InputError(
                f"layout: tp = {tp} does not divide the {size} {what} of specialist {name}; tp of {works} would"
            )
    if arch.layers % pp:
        works = ", ".join(str(p) for p in range(1, arch.layers + 1) if arch.layers % p == 0)
        raise InputError(
            f"layout: pp = {pp} does not divide the {arch.layers} layers of specialist {name}; pp of {works} would"
        )
