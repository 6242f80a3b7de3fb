"""Read a Hugging Face model folder: its architecture and slices of its tensors.

Nothing is loaded whole: the architecture comes from config.json, and every tensor is read by row or
column slice straight from safetensors, so each rank touches only the bytes it keeps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ultrafuser_mega.errors import InputError

_SUPPORTED_TYPES = ("llama",)
_EMBEDDING, _FINAL_NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_DERIVED = "rotary_emb.inv_freq"  # a buffer that old files store; rope_theta says the same


@dataclass(frozen=True)
class Architecture:
    """What a specialist's sharded model needs to know of its config.json (sizes in elements)."""

    layers: int
    hidden_size: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_rows: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    tied: bool


def read_architecture(folder: Path) -> Architecture:
    """Architecture of the Llama-family model in ``folder``.

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
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds a {type(config).__name__}; expected a JSON object of fields")
    _refuse_unsupported(path, config)
    hidden_size, heads = _size(path, config, "hidden_size"), _size(path, config, "num_attention_heads")
    kv_heads = _size(path, config, "num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise InputError(f"{path}: num_key_value_heads = {kv_heads} does not divide num_attention_heads = {heads}")
    rope = config.get("rope_parameters") or {}  # transformers 5; earlier versions had rope_theta on top
    return Architecture(
        layers=_size(path, config, "num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_size=_size(path, config, "intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_size(path, config, "head_dim", default=hidden_size // heads),
        vocab_rows=_size(path, config, "vocab_size"),
        max_positions=_size(path, config, "max_position_embeddings", default=2048),
        norm_eps=float(config.get("rms_norm_eps") or 1e-6),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 1e4),
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


def _refuse_unsupported(path: Path, config: dict[str, Any]) -> None:
    wanted = {
        "model_type": _SUPPORTED_TYPES,
        "hidden_act": ("silu", None),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "rope_scaling": (None,),
        "quantization_config": (None,),
    }
    rope_type = (config.get("rope_parameters") or {}).get("rope_type", "default")
    found = {**{field: config.get(field) for field in wanted}, "rope_parameters.rope_type": rope_type}
    wanted["rope_parameters.rope_type"] = ("default",)
    if isinstance(found["rope_scaling"], dict) and found["rope_scaling"].get("rope_type") == "default":
        found["rope_scaling"] = None
    for field, value in found.items():
        if value not in wanted[field]:
            allowed = " or ".join(repr(choice) for choice in wanted[field] if choice is not None) or "no value"
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
        for tensor in self._file_of:
            if tensor not in shapes and not tensor.endswith(_DERIVED):
                raise InputError(f"{self.folder}: holds the tensor {tensor}, which config.json does not call for")

    def read(self, tensor: str, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
        """``tensor[rows]`` or ``tensor[rows, columns]``."""
        view = self._slice(tensor)
        return view[rows] if columns is None else view[rows, columns]

    def _slice(self, tensor: str) -> Any:
        return self._files[self._file_of[tensor]].get_slice(tensor)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{index}: holds no weight_map; expected the index that save_pretrained writes") from None


class LlamaWeights:
    """Slices of a Llama folder in the layout that Megatron-core's layers keep them.

    Megatron fuses q, k, v per query group ([q heads of the group, k, v] for each of the ``kv_heads`` groups)
    and stacks gate and up projections; Hugging Face keeps them apart. Both rotate halves, so no permutation.

    Raises:
        InputError: the folder cannot be read, or its tensors are not those of ``architecture``.
    """

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        self.arch = architecture
        self.tensors = TensorFolder(folder)
        # A tied model may still store its head.
        self._head = _EMBEDDING if architecture.tied and _HEAD not in self.tensors else _HEAD
        self.tensors.check(_shapes(architecture) | {self._head: (architecture.vocab_rows, architecture.hidden_size)})

    def embedding(self, rows: slice) -> Tensor:  # (rows, d)
        """Rows of the input embedding."""
        return self.tensors.read(_EMBEDDING, rows)

    def head(self, rows: slice) -> Tensor:  # (rows, d)
        """Rows of the output head; of the embedding where the model ties them."""
        return self.tensors.read(self._head, rows)

    def final_norm(self) -> Tensor:  # (d,)
        """Weight of the norm after the last layer."""
        return self.tensors.read(_FINAL_NORM)

    def layer(self, index: int, tp_rank: int, tp: int) -> dict[str, Tensor]:
        """Tensor-parallel shard of decoder layer ``index`` under Megatron's parameter names."""
        a, prefix, read = self.arch, f"model.layers.{index}.", self.tensors.read
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        groups, ffn = _share(a.kv_heads, tp_rank, tp), _share(a.ffn_size, tp_rank, tp)
        count, q_heads = groups.stop - groups.start, a.heads // a.kv_heads
        q_rows = slice(groups.start * q_heads * a.head_dim, groups.stop * q_heads * a.head_dim)
        kv_rows = slice(groups.start * a.head_dim, groups.stop * a.head_dim)
        parts = [
            read(attention + "q_proj.weight", q_rows).view(count, q_heads, a.head_dim, a.hidden_size),
            read(attention + "k_proj.weight", kv_rows).view(count, 1, a.head_dim, a.hidden_size),
            read(attention + "v_proj.weight", kv_rows).view(count, 1, a.head_dim, a.hidden_size),
        ]
        return {
            "input_layernorm.weight": read(prefix + "input_layernorm.weight"),
            "self_attention.linear_qkv.weight": torch.cat(parts, dim=1).reshape(-1, a.hidden_size),
            "self_attention.linear_proj.weight": read(attention + "o_proj.weight", columns=q_rows),
            "pre_mlp_layernorm.weight": read(prefix + "post_attention_layernorm.weight"),
            "mlp.linear_fc1.weight": torch.cat([read(mlp + f"{half}_proj.weight", ffn) for half in ("gate", "up")]),
            "mlp.linear_fc2.weight": read(mlp + "down_proj.weight", columns=ffn),
        }


def _shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama folder but the head -> its shape."""
    d, q_size, kv_size = a.hidden_size, a.heads * a.head_dim, a.kv_heads * a.head_dim
    of_layer = {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (q_size, d),
        "self_attn.k_proj.weight": (kv_size, d),
        "self_attn.v_proj.weight": (kv_size, d),
        "self_attn.o_proj.weight": (d, q_size),
        "post_attention_layernorm.weight": (d,),
        "mlp.gate_proj.weight": (a.ffn_size, d),
        "mlp.up_proj.weight": (a.ffn_size, d),
        "mlp.down_proj.weight": (d, a.ffn_size),
    }
    layers = {f"model.layers.{i}.{name}": shape for i in range(a.layers) for name, shape in of_layer.items()}
    return {_EMBEDDING: (a.vocab_rows, d), **layers, _FINAL_NORM: (d,)}


def _share(size: int, rank: int, parts: int) -> slice:
    return slice(size // parts * rank, size // parts * (rank + 1))


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
