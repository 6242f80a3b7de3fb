"""Read a Hugging Face model folder: its architecture (``hf_config``) and slices of its tensors.

Nothing is loaded whole: every tensor is read by row or column slice straight from safetensors
(``safetensors_file``), so each rank touches only the bytes it keeps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.dtypes import narrowed
from ultrafuser_mega.models.families import FAMILIES, Architecture
from ultrafuser_mega.models.hf_config import parse_architecture, read_architecture, read_json_object, unread_fields
from ultrafuser_mega.models.safetensors_file import WEIGHT_TYPES, SafetensorsFile

__all__ = [
    "EMBEDDING",
    "FINAL_NORM",
    "HEAD",
    "Architecture",
    "HFWeights",
    "TensorFolder",
    "answer_ends",
    "check_parallel_sizes",
    "check_positions",
    "hf_shapes",
    "parse_architecture",
    "read_architecture",
    "read_json_object",
    "unread_fields",
]

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_DERIVED = "rotary_emb.inv_freq"  # a buffer that old files store; rope_theta says the same


class TensorFolder:
    """The safetensors of a model folder, read by slice.

    As in transformers, model.safetensors is read where it is there, and an index beside it is not.

    Raises:
        InputError: a file is missing, truncated or not safetensors, or only pickle weights are there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if single.is_file():
            file = SafetensorsFile(single)
            self._file_of = dict.fromkeys(file.tensors, file)
        elif index.is_file():
            self._file_of = _indexed(index)
        else:
            hint = "; pickle weights are not read, save the model as safetensors" if any(folder.glob("*.bin")) else ""
            raise InputError(f"{folder}: has neither model.safetensors nor model.safetensors.index.json{hint}")

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._file_of

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a folder that does not hold exactly the tensors of ``shapes``.

        Raises:
            InputError: a tensor is missing, has another shape, an element type that is not read, or is not called
                for; names the first.
        """
        for tensor, shape in shapes.items():
            if tensor not in self:
                raise InputError(f"{self.folder}: tensor {tensor} is missing from the safetensors files")
            found = self._file_of[tensor].tensors[tensor].shape
            if found != shape:
                raise InputError(f"{self.folder}: tensor {tensor} has shape {found}, config.json calls for {shape}")
            self.dtype(tensor)
        for tensor in self._file_of:
            if tensor not in shapes and not tensor.endswith(_DERIVED):
                raise InputError(f"{self.folder}: holds the tensor {tensor}, which config.json does not call for")

    def names(self) -> list[str]:
        """Names of all tensors but those that say again what config.json says."""
        return [tensor for tensor in self._file_of if not tensor.endswith(_DERIVED)]

    def dtype(self, tensor: str) -> torch.dtype:
        """Element type of a tensor, from its file's header.

        Raises:
            InputError: it is none of those that weights may have.
        """
        code = self._file_of[tensor].tensors[tensor].code
        if code not in WEIGHT_TYPES:
            raise InputError(
                f"{self.folder}: tensor {tensor} is {code}; expected fp32, bf16 or fp16 weights: "
                "save the model in one of these"
            )
        return WEIGHT_TYPES[code]

    def read(
        self,
        tensor: str,
        rows: slice = slice(None),
        columns: slice | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """``tensor[rows]`` or ``tensor[rows, columns]``, in ``dtype`` or in the type that it is stored in.

        Raises:
            InputError: it is stored in a type that weights may not have, or ``dtype`` does not hold a value of it.
        """
        self.dtype(tensor)
        value = self._file_of[tensor].read(tensor, rows, columns)
        return value if dtype is None else narrowed(value, dtype, f"{self.folder}: tensor {tensor}")


def _indexed(index: Path) -> dict[str, SafetensorsFile]:
    """Tensor -> the file that the index names for it."""
    weight_map = _weight_map(index)
    files = {}
    for name in sorted(set(weight_map.values())):
        if not (index.parent / name).is_file():
            raise InputError(f"{index.parent / name}: named by the index but missing")
        files[name] = SafetensorsFile(index.parent / name)
    for tensor, name in weight_map.items():
        if tensor not in files[name].tensors:
            raise InputError(f"{index}: names {tensor} in {name}, which does not hold it")
    return {tensor: files[name] for tensor, name in weight_map.items()}


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

    Args:
        folder: of the model.
        architecture: that its config.json describes.
        dtype: to read everything in; None: as it is stored.

    Raises:
        InputError: the folder cannot be read, or its tensors are not those of ``architecture``; on reading, ``dtype``
            does not hold a value.
    """

    def __init__(self, folder: Path, architecture: Architecture, dtype: torch.dtype | None = None) -> None:
        self.arch = architecture
        self.dtype = dtype
        self.tensors = TensorFolder(folder)
        # A tied model may still store its head.
        self._head = EMBEDDING if architecture.tied and HEAD not in self.tensors else HEAD
        shapes = hf_shapes(architecture)
        if self._head == EMBEDDING:
            del shapes[HEAD]
        self.tensors.check(shapes)

    def embedding(self, rows: slice) -> Tensor:  # (rows, d)
        """Rows of the input embedding."""
        return self.tensors.read(EMBEDDING, rows, dtype=self.dtype)

    def head(self, rows: slice) -> Tensor:  # (rows, d)
        """Rows of the output head; of the embedding where the model ties them."""
        return self.tensors.read(self._head, rows, dtype=self.dtype)

    def final_norm(self) -> Tensor:  # (d,)
        """Weight of the norm after the last layer."""
        return self.tensors.read(FINAL_NORM, dtype=self.dtype)

    def layer(self, index: int, tp_rank: int, tp: int) -> dict[str, Tensor]:
        """Tensor-parallel shard of decoder layer ``index`` under Megatron's parameter names."""

        def read(name: str, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
            return self.tensors.read(f"model.layers.{index}.{name}", rows, columns, self.dtype)

        rules = FAMILIES[self.arch.family].rules
        return {rule.parameter: rule.shard(self.arch, read, tp_rank, tp) for rule in rules}


def hf_shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of a folder, the output head included -> its shape."""
    d = a.hidden_size
    of_layer = {name: shape for rule in FAMILIES[a.family].rules for name, shape in rule.shapes(a).items()}
    layers = {f"model.layers.{i}.{name}": shape for i in range(a.layers) for name, shape in of_layer.items()}
    return {EMBEDDING: (a.vocab_rows, d), **layers, FINAL_NORM: (d,), HEAD: (a.vocab_rows, d)}


def answer_ends(folder: Path) -> list[int]:
    """The tokens that the folder's generation_config.json ends an answer with; none where it has no such file.

    Raises:
        InputError: the file is damaged, or one of them is no token.
    """
    path = folder / "generation_config.json"
    given = read_json_object(path).get("eos_token_id") if path.is_file() else None
    tokens = given if isinstance(given, list) else [] if given is None else [given]
    if any(type(token) is not int for token in tokens):
        raise InputError(f"{path}: eos_token_id = {given!r}; expected a token or a list of tokens")
    return [token for token in tokens if token >= 0]  # some write -1 for none


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
    """Refuse a tp that the specialist's sizes cannot be sharded by, and more pipeline stages than it has layers.

    Key/value heads are shared out among the ranks, or the ranks among them: one number must divide the other.

    Raises:
        InputError: names the specialist, the size and the values that would work.
    """
    if problem := _unsharded(arch, tp):
        works = ", ".join(str(t) for t in range(1, arch.heads + 1) if not _unsharded(arch, t))
        raise InputError(f"layout: tp = {tp} {problem} of specialist {name}; tp of {works} would")
    if pp > arch.layers:
        raise InputError(
            f"layout: pp = {pp} is more than the {arch.layers} layers of specialist {name}; make it smaller"
        )


def _unsharded(arch: Architecture, tp: int) -> str:
    """What of the specialist ``tp`` ranks cannot share, in words; empty where there is nothing."""
    if arch.heads % tp:
        return f"does not divide the {arch.heads} attention heads"
    if arch.kv_heads % tp and tp % arch.kv_heads:
        return f"neither divides nor is a multiple of the {arch.kv_heads} key/value heads"
    return f"does not divide the {arch.ffn_size} MLP width" if arch.ffn_size % tp else ""
