"""A checkpoint's tensors under their Hugging Face names, one at a time: the way back of ``models.families``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultrafuser_mega.checkpoint.checkpoint import PROGRESS, no_checkpoint
from ultrafuser_mega.checkpoint.left_out import changing, weights_beside
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.checkpoint.sources import (
    CARD,
    CONFIG,
    Source,
    held_type,
    read_sources,
    rounding,
    stored_type,
    trained_specialists,
)
from ultrafuser_mega.checkpoint.tensors import CheckpointTensors
from ultrafuser_mega.config import HEADS, Lora, load_config
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.families import FAMILIES
from ultrafuser_mega.models.hf_folder import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    HFWeights,
    TensorFolder,
    hf_shapes,
    read_architecture,
)

_ROWS_AT_ONCE = 8192


class TrainedModel:
    """A checkpoint folder as export sees it.

    Attributes:
        progress: how far its run was.
        trained: specialists whose weights, heads or adapters have been trained.
        adapters: specialist -> its adapters', of those that have some.
        student: of its specialists, the one that a distillation trains; None: it is none.
        teacher: checkpoint of the fused model that the student learned from.
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
            adapted = dict(record["identity"].get("adapters", {}))
        except FileNotFoundError:
            raise no_checkpoint(folder) from None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: damaged ({error!r}); copy the checkpoint again") from None
        self.trained = trained_specialists(folder, self.progress)
        self.fused = (folder / CONFIG).is_file() or (folder / CARD).is_file()
        self.sources = read_sources(folder)
        self.tensors = CheckpointTensors(folder)
        config = load_config(folder / CONFIG) if (folder / CONFIG).is_file() else None
        planned = config.adapters if config is not None else {}  # which an import of a configuration only begins
        self.adapters = {name: lora for name, lora in planned.items() if name in adapted}
        self.student = config.student if config is not None else None
        self.teacher = config.distil.teacher if config is not None and config.distil is not None else None
        self._head_trained = config is None or HEADS in changing(config)

    def specialist(self, name: str) -> RestoredSpecialist:
        """One of its specialists; raises InputError if there is none of this name or its tensors do not fit."""
        if name not in self.sources:
            raise InputError(f"--what specialist:{name}: {self.folder} holds {', '.join(self.sources)}")
        if self.student is not None and name != self.student:  # its body is not there, or not as it was fused
            raise InputError(
                f"{self.folder}: of a distillation {self.student} alone is meant; {name} is its teacher's, "
                f"{self.teacher}"
            )
        return RestoredSpecialist(
            name,
            self.sources[name],
            self.tensors,
            self.vocab_size,
            trained=name in self.trained,
            lora=self.adapters.get(name),
            head_trained=self._head_trained,
        )

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
        lora: of its adapters, which are merged into what is read; None: it has none.
        head_trained: whether its head is another than it came with.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        tensors: CheckpointTensors,
        vocab_size: int,
        *,
        trained: bool,
        lora: Lora | None = None,
        head_trained: bool = True,
    ) -> None:
        self.name, self.source, self.tensors, self.vocab_size = name, source, tensors, vocab_size
        self.trained, self.lora, self.head_trained = trained, lora, trained and head_trained
        self.arch = read_architecture(source.folder)
        beside = weights_beside(tensors.folder, [name])
        self._beside = HFWeights(beside[name], self.arch) if beside else None
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

    @property
    def layer_weights(self) -> list[str]:
        """Names of a layer's tensors, within the layer."""
        return list(self._rules)

    def rounded(self) -> str:
        """What was rounded on its way into the checkpoint, in words; empty where nothing was."""
        return rounding(self.source.dtypes, self._stored)

    @property
    def _stored(self) -> torch.dtype:
        return stored_type(self.tensors)

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
            key = self._key("decoder.final_layernorm.weight")
            value = self.tensors.read(key) if self._holds(key) else self._from_folder(tensor)
        else:
            layer, name = tensor.removeprefix("model.layers.").split(".", 1)
            if self._holds(self._key(f"decoder.layers.{self._rules[name].stored}")):
                value = self._held(int(layer), name)
            else:
                value = self._from_folder(tensor)
            value = self._merged(value, int(layer), name)
        return value.to(self.dtype(tensor)).contiguous()

    def stands_on_its_folder(self) -> bool:
        """Whether what its adapters change is as in the folder that it came from, by the first layer.

        Not so where ``checkpoint.start`` gave it weights that had been trained. A folder that is gone passes.
        """
        origin = Path(self.source.origin)
        if self.lora is None or self._beside is not None or not (origin / "config.json").is_file():
            return True
        theirs, lora = TensorFolder(origin), self.lora
        for name in self._rules:
            if name.split(".")[-2] in lora.targets and name.endswith(".weight"):
                own, tensor = self._held(0, name), f"model.layers.0.{name}"
                if tensor not in theirs or not torch.equal(own, theirs.read(tensor, dtype=own.dtype)):
                    return False
        return True

    def adapter(self, layer: int, projection: str) -> tuple[Tensor, Tensor] | None:
        """A (r, inputs) and B (outputs, r) beside a projection of a layer; None where it has none."""
        keys = [self._key(f"adapters.{projection}.lora_{letter}") for letter in "AB"]
        if self.lora is None or projection not in self.lora.targets:
            return None
        a, b = (self.tensors.read(key, slice(layer, layer + 1))[0] for key in keys)
        return a, b

    def _held(self, layer: int, name: str) -> Tensor:
        """A layer's weight as the checkpoint holds it, without adapters."""
        rule = self._rules[name]
        return rule.restore(self.arch, name, partial(self._of_layer, layer, rule.stored))

    def _merged(self, weight: Tensor, layer: int, name: str) -> Tensor:
        found = self.adapter(layer, name.split(".")[-2]) if name.endswith("_proj.weight") else None
        if found is None or self.lora is None:
            return weight
        a, b = found
        return weight.float() + self.lora.scale * (b.float() @ a.float())

    def _holds(self, key: str) -> bool:
        """Whether the checkpoint does, or leaves it to the folder."""
        return self._beside is None or key in self.tensors

    def _from_folder(self, tensor: str, rows: slice = slice(None)) -> Tensor:
        """As training had it: in the checkpoint's type."""
        assert self._beside is not None
        tensor = tensor if tensor in self._beside.tensors else EMBEDDING
        return self._beside.tensors.read(tensor, rows, dtype=self._stored)

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
        key = self._key("embedding.word_embeddings.weight")
        return self.tensors.read(key, rows) if self._holds(key) else self._from_folder(EMBEDDING, rows)

    def _head(self, rows: slice) -> Tensor:
        """Rows of the head: shared ones lie in ``heads``, those beyond the shared vocabulary in ``tails``."""
        if not self._holds(f"heads.{self.name}"):
            return self._from_folder(HEAD, rows)
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
        lora = self.lora
        for projection in lora.targets if lora is not None else ():
            assert lora is not None
            hf = next(hf for hf in self._rules if hf.endswith(f".{projection}.weight"))
            outputs, inputs = self.shapes[f"model.layers.0.{hf}"]
            shapes[self._key(f"adapters.{projection}.lora_A")] = (a.layers, lora.rank, inputs)
            shapes[self._key(f"adapters.{projection}.lora_B")] = (a.layers, outputs, lora.rank)
        for key, shape in shapes.items():
            if not self._holds(key) and ".adapters." not in key:
                continue
            self._compare(key, shape, self.tensors.shape(key) == shape)
        padded = {self._key("embedding.word_embeddings.weight"): a.vocab_rows, f"heads.{self.name}": self.vocab_size}
        for key, rows in ((key, rows) for key, rows in padded.items() if self._holds(key)):
            found = self.tensors.shape(key)
            self._compare(key, (rows, a.hidden_size), found[0] >= rows and found[1:] == (a.hidden_size,))

    def _compare(self, key: str, shape: tuple[int, ...], fits: bool) -> None:
        if not fits:
            raise InputError(
                f"{self.tensors.folder}: tensor {key} has shape {self.tensors.shape(key)}, "
                f"{self.source.folder / 'config.json'} calls for {shape}"
            )
