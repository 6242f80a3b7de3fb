"""Models whose tensors can be added up: equal shapes but for vocabulary rows, which are cropped to the shared ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ultrafuser_mega.data.tokenizer import check_tokenizers, shared_vocab_size
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.families import Architecture
from ultrafuser_mega.models.hf_folder import EMBEDDING, HEAD, HFWeights, hf_shapes, read_architecture

#: What a model computes with beside its tensors; where models differ in it, the first one's is taken.
_BESIDE_TENSORS = ("family", "norm_eps", "rope_theta", "rope_scaling", "max_positions", "sliding_window")
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Ingredients:
    """Models of equal shapes; nothing of them is read but the rows that are asked for.

    Attributes:
        folders: name -> Hugging Face folder.
        architecture: of the first, with the shared vocabulary.
        tied: whether the output head of every one is its embedding.
        notices: what they differ in beside their tensors, for people.
    """

    folders: Mapping[str, Path]
    architecture: Architecture
    tied: bool
    notices: tuple[str, ...]
    _weights: Mapping[str, HFWeights]

    @classmethod
    def of(cls, folders: Mapping[str, Path], vocab_size: int | None = None) -> Ingredients:
        """Compare ``folders`` and crop them to ``vocab_size`` rows; None: the fewest that one has.

        Raises:
            InputError: one cannot be read; shapes, or tokenizers below the vocabulary, disagree.
        """
        architectures = {name: read_architecture(folder) for name, folder in folders.items()}
        rows = min(vocab_size or shared_vocab_size(folders), shared_vocab_size(folders))
        cropped = {name: replace(found, vocab_rows=rows) for name, found in architectures.items()}
        weights = {name: HFWeights(folder, architectures[name]) for name, folder in folders.items()}
        _check_shapes(cropped)
        check_tokenizers(folders, rows)
        first = next(iter(cropped.values()))
        return cls(
            folders=folders,
            architecture=first,
            tied=all(found.tied and HEAD not in weights[name].tensors for name, found in architectures.items()),
            notices=tuple(_differences(cropped)),
            _weights=weights,
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that a model put together of these has -> its shape; no head where it is the embedding."""
        shapes = hf_shapes(self.architecture)
        if self.tied:
            del shapes[HEAD]
        return shapes

    def dtype(self, tensor: str) -> torch.dtype:
        """The narrowest element type that holds the tensor's of all models."""
        found = torch.float16
        for number, weights in enumerate(self._weights.values()):
            own = weights.tensors.dtype(self._stored(weights, tensor))
            found = torch.promote_types(found, own) if number else own
        return found

    def read(self, name: str, tensor: str, rows: slice = slice(None)) -> Tensor:
        """Rows of one model's tensor as they are stored; of the embedding for the head of a tied one."""
        weights, shape = self._weights[name], hf_shapes(self.architecture)[tensor]
        return weights.tensors.read(self._stored(weights, tensor), slice(*rows.indices(shape[0])))

    def row_blocks(self, tensor: str) -> Iterator[slice]:
        """The tensor's rows in parts small enough to be held in float64 beside it."""
        rows = hf_shapes(self.architecture)[tensor][0]
        for start in range(0, rows, _ROWS_AT_ONCE):
            yield slice(start, min(start + _ROWS_AT_ONCE, rows))

    @staticmethod
    def _stored(weights: HFWeights, tensor: str) -> str:
        return EMBEDDING if tensor == HEAD and HEAD not in weights.tensors else tensor


def _check_shapes(architectures: Mapping[str, Architecture]) -> None:
    (first, model), *others = architectures.items()
    shapes = hf_shapes(model)
    for name, other in others:
        theirs = hf_shapes(other)
        for tensor in dict.fromkeys([*shapes, *theirs]):
            if shapes.get(tensor) != theirs.get(tensor):
                here, there = (str(found.get(tensor, "missing")) for found in (shapes, theirs))
                raise InputError(
                    f"{first} and {name} have other shapes: {tensor} is {here} in {first} and {there} in {name}; only "
                    "models of equal shapes can be put together: leave one out, or take specialists of one base model"
                )


def _differences(architectures: Mapping[str, Architecture]) -> Iterator[str]:
    (first, model), *others = architectures.items()
    for name, other in others:
        ours, theirs = asdict(model), asdict(other)
        for field in _BESIDE_TENSORS:
            if ours[field] != theirs[field]:
                yield f"{field} is {ours[field]} for {first} and {theirs[field]} for {name}; that of {first} is kept"
