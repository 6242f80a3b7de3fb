"""Read a Hugging Face model folder: its architecture and slices of its tensors.

Nothing is loaded whole: the architecture comes from config.json, and every tensor is read by row or
column slice straight from safetensors, so each rank touches only the bytes it keeps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ultrafuser_mega.errors import InputError

_SUPPORTED_TYPES = ("llama",)
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


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
        config: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    _refuse_unsupported(path, config)
    try:
        hidden_size, heads = config["hidden_size"], config["num_attention_heads"]
        rope = config.get("rope_parameters") or {}  # transformers 5; earlier versions had rope_theta on top
        return Architecture(
            layers=config["num_hidden_layers"],
            hidden_size=hidden_size,
            ffn_size=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden_size // heads,
            vocab_rows=config["vocab_size"],
            max_positions=config.get("max_position_embeddings", 2048),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            tied=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise InputError(f"{path}: lacks the field {error}") from None


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
        InputError: on construction, when a file is missing, truncated or not safetensors, or only pickle
            weights are there; on reading, when a tensor is missing or has another shape than asked for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
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

    def read(
        self, tensor: str, shape: tuple[int, ...], rows: slice = slice(None), columns: slice | None = None
    ) -> Tensor:
        """``tensor[rows]`` or ``tensor[rows, columns]``, checked to come from a tensor of ``shape``."""
        if tensor not in self._file_of:
            raise InputError(f"{self.folder}: tensor {tensor} is missing from the safetensors files")
        view = self._files[self._file_of[tensor]].get_slice(tensor)
        if tuple(view.get_shape()) != shape:
            raise InputError(
                f"{self.folder}: tensor {tensor} has shape {tuple(view.get_shape())}, config.json calls for {shape}"
            )
        return view[rows] if columns is None else view[rows, columns]


class LlamaWeights:
    """Slices of a Llama folder in the layout that Megatron-core's layers keep them.

    Megatron fuses q, k, v per query group ([q heads of the group, k, v] for each of the ``kv_heads`` groups)
    and stacks gate and up projections; Hugging Face keeps them apart. Both rotate halves, so no permutation.
    """

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        self.arch = architecture
        self.tensors = TensorFolder(folder)

    def embedding(self, rows: slice) -> Tensor:  # (rows, d)
        """Rows of the input embedding."""
        return self.tensors.read(_EMBEDDING, (self.arch.vocab_rows, self.arch.hidden_size), rows)

    def head(self, rows: slice) -> Tensor:  # (rows, d)
        """Rows of the output head; of the embedding where the model ties them."""
        name = _EMBEDDING if self.arch.tied and _HEAD not in self.tensors else _HEAD
        return self.tensors.read(name, (self.arch.vocab_rows, self.arch.hidden_size), rows)

    def final_norm(self) -> Tensor:  # (d,)
        """Weight of the norm after the last layer."""
        return self.tensors.read("model.norm.weight", (self.arch.hidden_size,))

    def layer(self, index: int, tp_rank: int, tp: int) -> dict[str, Tensor]:
        """Tensor-parallel shard of decoder layer ``index`` under Megatron's parameter names."""
        a, prefix = self.arch, f"model.layers.{index}."
        d, q_size, kv_size = a.hidden_size, a.heads * a.head_dim, a.kv_heads * a.head_dim
        groups, ffn = _share(a.kv_heads, tp_rank, tp), _share(a.ffn_size, tp_rank, tp)
        q_heads = a.heads // a.kv_heads
        q_rows = slice(groups.start * q_heads * a.head_dim, groups.stop * q_heads * a.head_dim)
        kv_rows = slice(groups.start * a.head_dim, groups.stop * a.head_dim)
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        count = groups.stop - groups.start
        parts = [
            self.tensors.read(attention + "q_proj.weight", (q_size, d), q_rows).view(count, q_heads, a.head_dim, d),
            self.tensors.read(attention + "k_proj.weight", (kv_size, d), kv_rows).view(count, 1, a.head_dim, d),
            self.tensors.read(attention + "v_proj.weight", (kv_size, d), kv_rows).view(count, 1, a.head_dim, d),
        ]
        gate = self.tensors.read(mlp + "gate_proj.weight", (a.ffn_size, d), ffn)
        up = self.tensors.read(mlp + "up_proj.weight", (a.ffn_size, d), ffn)
        return {
            "input_layernorm.weight": self.tensors.read(prefix + "input_layernorm.weight", (d,)),
            "self_attention.linear_qkv.weight": torch.cat(parts, dim=1).reshape(-1, d),
            "self_attention.linear_proj.weight": self.tensors.read(
                attention + "o_proj.weight", (d, q_size), columns=q_rows
            ),
            "pre_mlp_layernorm.weight": self.tensors.read(prefix + "post_attention_layernorm.weight", (d,)),
            "mlp.linear_fc1.weight": torch.cat([gate, up]),
            "mlp.linear_fc2.weight": self.tensors.read(mlp + "down_proj.weight", (d, a.ffn_size), columns=ffn),
        }


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
