"""A checkpoint's tensors under their Hugging Face names, one at a time: the way back of ``models.families``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultrafuser_mega.checkpoint.checkpoint import PROGRESS, Progress, no_checkpoint
from ultrafuser_mega.checkpoint.sources import CARD, CONFIG, Source, held_type, read_sources, rounding
from ultrafuser_mega.checkpoint.tensors import CheckpointTensors
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.families import FAMILIES
from ultrafuser_mega.models.hf_folder import EMBEDDING, FINAL_NORM, HEAD, hf_shapes, read_architecture

_ROWS_AT_ONCE = 8192


class TrainedModel:
    """A checkpoint folder as export sees it.

    Attributes:
        progress: how far its run was.
        trained: whether specialists have been trained: stage 1 leaves them as they came.
        fused: whether its gate belongs to them: not where single folders were imported.
        vocab_size: entries of the shared vocabulary.
        gate_units: hidden units of the gate.
        sources: name -> what is kept of that specialist's folder.

    Raises:
        InputError: not a complete checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / PROGRESS
        try:
            record: dict[str, Any] = json.loads(path.read_text())
            self.progress = Progress(**record["progress"])
            self.vocab_size = int(record["identity"]["vocab_size"])
            self.gate_units = int(record["identity"]["gate_units"])
        except FileNotFoundError:
            raise no_checkpoint(folder) from None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: damaged ({error!r}); copy the checkpoint again") from None
        self.trained = self.progress.trained
        self.fused = (folder / CONFIG).is_file() or (folder / CARD).is_file()
        self.sources = read_sources(folder)
        self.tensors = CheckpointTensors(folder)

    def specialist(self, name: str) -> RestoredSpecialist:
        """One of its specialists; raises InputError if there is none of this name or its tensors do not fit."""
        if name not in self.sources:
            raise InputError(f"--what specialist:{name}: {self.folder} holds {', '.join(self.sources)}")
        return RestoredSpecialist(name, self.sources[name], self.tensors, self.vocab_size, trained=self.trained)

    def gate_keys(self) -> list[str]:
        """Names of the gate's tensors, as in a release folder."""
        first = ["shared"] if "gate.w1.shared" in self.tensors else list(self.sources)
        return [*(f"gate.w1.{name}" for name in first), "gate.b1", "gate.w2"]

    def gate(self, key: str) -> Tensor:
        """A tensor of the gate, without the units that pad it."""
        return self.tensors.read(key, slice(0, self.gate_units))


class RestoredSpecialist:
    """The Hugging Face tensors of one specialist of a checkpoint.

    Attributes:
        arch: from its config.json as kept in the checkpoint.
        source: what is kept of its folder.
        trained: whether its weights are others than those it came with.
    """

    def __init__(
        self, name: str, source: Source, tensors: CheckpointTensors, vocab_size: int, *, trained: bool
    ) -> None:
        self.name, self.source, self.tensors, self.vocab_size = name, source, tensors, vocab_size
        self.trained = trained
        self.arch = read_architecture(source.folder)
        self.shapes = hf_shapes(self.arch)
        self._rules = {hf: rule for rule in FAMILIES[self.arch.family].rules for hf in rule.shapes(self.arch)}
        self._last: tuple[tuple[str, slice], Tensor] | None = None  # q, k and v come from one fused tensor
        self._check()

    def dtype(self, tensor: str) -> torch.dtype:
        """The element type that the tensor came with, unless training or rounding made another of it.

        So writing it rounds nothing, and claims no more precision than there is. A head that its folder tied has the
        embedding's.
        """
        came = self.source.dtypes.get(tensor) or (self.source.dtypes.get(EMBEDDING) if tensor == HEAD else None)
        if came is None:
            raise InputError(f"{self.source.folder.parent.parent}/sources.json: names no element type for {tensor}")
        return held_type(came, self._stored, trained=self.trained)

    def rounded(self) -> str:
        """What was rounded on its way into the checkpoint, in words; empty where nothing was."""
        return rounding(self.source.dtypes, self._stored)

    @property
    def _stored(self) -> torch.dtype:
        return self.tensors.dtype(f"heads.{self.name}")

    def tied(self) -> bool:
        """Whether the folder tied the head to the embedding and both are still equal."""
        if not self.arch.tied:
            return False
        return all(torch.equal(self._embedding(rows), self._head(rows)) for rows in self._row_blocks())

    def read(self, tensor: str) -> Tensor:
        """The whole tensor in its element type (see ``dtype``); every row, no padding."""
        if tensor in (EMBEDDING, HEAD):  # the largest: never twice in memory
            read = self._embedding if tensor == EMBEDDING else self._head
            value = torch.empty(self.shapes[tensor], dtype=self.dtype(tensor))
            for rows in self._row_blocks():
                value[rows] = read(rows)
        elif tensor == FINAL_NORM:
            value = self.tensors.read(self._key("decoder.final_layernorm.weight"))
        else:
            layer, name = tensor.removeprefix("model.layers.").split(".", 1)
            rule = self._rules[name]
            value = rule.restore(self.arch, name, lambda part: self._of_layer(int(layer), rule.stored, part))
        return value.to(self.dtype(tensor)).contiguous()

    def _key(self, name: str) -> str:
        return f"specialists.{self.name}.{name}"

    def _of_layer(self, layer: int, stored: str, rows: slice) -> Tensor:
        wanted = (f"{layer}.{stored}", rows)
        if self._last is None or self._last[0] != wanted:
            self._last = None  # let go of the old one before the new one is read
            key = self._key(f"decoder.layers.{stored}")
            self._last = (wanted, self.tensors.read(key, slice(layer, layer + 1), rows)[0])
        return self._last[1]

    def _row_blocks(self) -> Iterator[slice]:
        for start in range(0, self.arch.vocab_rows, _ROWS_AT_ONCE):
            yield slice(start, min(start + _ROWS_AT_ONCE, self.arch.vocab_rows))

    def _embedding(self, rows: slice) -> Tensor:
        return self.tensors.read(self._key("embedding.word_embeddings.weight"), rows)

    def _head(self, rows: slice) -> Tensor:
        """Rows of the head: shared ones lie in ``heads``, those beyond the shared vocabulary in ``tails``."""
        shared = slice(min(rows.start, self.vocab_size), min(rows.stop, self.vocab_size))
        head = self.tensors.read(f"heads.{self.name}", shared)
        if rows.stop <= self.vocab_size:
            return head
        tail = slice(max(rows.start - self.vocab_size, 0), rows.stop - self.vocab_size)
        result = torch.empty((rows.stop - rows.start, self.arch.hidden_size), dtype=head.dtype)
        result[: len(head)] = head
        result[len(head) :] = self.tensors.read(f"tails.{self.name}", tail)
        return result

    def _check(self) -> None:
        a = self.arch
        shapes = {
            self._key(f"decoder.layers.{rule.stored}"): (a.layers, *rule.whole_shape(a))
            for rule in self._rules.values()
        }
        shapes[self._key("decoder.final_layernorm.weight")] = (a.hidden_size,)
        if a.vocab_rows > self.vocab_size:
            shapes[f"tails.{self.name}"] = (a.vocab_rows - self.vocab_size, a.hidden_size)
        for key, shape in shapes.items():
            self._compare(key, shape, self.tensors.shape(key) == shape)
        padded = {self._key("embedding.word_embeddings.weight"): a.vocab_rows, f"heads.{self.name}": self.vocab_size}
        for key, rows in padded.items():
            found = self.tensors.shape(key)
            self._compare(key, (rows, a.hidden_size), found[0] >= rows and found[1:] == (a.hidden_size,))

    def _compare(self, key: str, shape: tuple[int, ...], fits: bool) -> None:
        if not fits:
            raise InputError(
                f"{self.tensors.folder}: tensor {key} has shape {self.tensors.shape(key)}, "
                f"{self.source.folder / 'config.json'} calls for {shape}"
            )
