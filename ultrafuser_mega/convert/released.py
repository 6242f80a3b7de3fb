"""A release folder as what it was made of: specialists, their templates and the gate, so that training can go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ultrafuser_mega.checkpoint.sources import (
    CARD,
    SOURCES,
    Source,
    SourceFiles,
    beside_weights,
    element_types,
    write_record,
)
from ultrafuser_mega.data.templates import PAPER_TEMPLATES
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.fused import FusedStage, load_weights
from ultrafuser_mega.models.hf_folder import (
    HEAD,
    Architecture,
    HFWeights,
    TensorFolder,
    parse_architecture,
    read_json_object,
)
from ultrafuser_mega.release.assemble import ADDITIONAL
from ultrafuser_mega.release.check import check_release

_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja"),
)


class ReleasedModel:
    """A release folder, its weights unread.

    Attributes:
        folder: the release.
        architectures: name -> its architecture, in the order of the gate weights.
        templates: name -> the name of its template.
        vocab_size: entries of the shared vocabulary.
        gate_units: hidden units of the gate.

    Raises:
        InputError: the folder is damaged, or a template is none that training knows.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = check_release(folder)
        # As it is written: what transformers makes of an entry may not be.
        entries = read_json_object(folder / "config.json")["specialists"]
        self._entries: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in entries}
        self.vocab_size, self.gate_units = config.vocab_size, config.gate_units
        self.architectures: dict[str, Architecture] = {
            name: parse_architecture(folder / "config.json", entry["config"]) for name, entry in self._entries.items()
        }
        self.templates = {name: self._template(name) for name in self._entries}

    def element_types(self, prefix: str) -> dict[str, torch.dtype]:
        """Tensors whose names begin with ``prefix``, under the rest of their names -> their element types."""
        types = element_types(self.folder)
        return {tensor.removeprefix(prefix): types[tensor] for tensor in types if tensor.startswith(prefix)}

    @torch.no_grad()
    def load(self, model: FusedStage) -> None:
        """Fill this rank's share of ``model``, in its element type: specialists, heads and gate.

        Raises:
            InputError: the folder holds a value that is beyond the element type.
        """
        tensors, dtype = TensorFolder(self.folder), model.config.params_dtype
        weights = {name: _ReleasedWeights(tensors, name, arch, dtype) for name, arch in self.architectures.items()}
        load_weights(model, weights)
        if model.fusion is None:
            return
        gate = model.fusion.gate
        start = gate.group.rank() * gate.local_units
        for name, parameter in gate.named_parameters():
            held = slice(start, max(start, min(start + gate.local_units, gate.units)))
            rows = tensors.read(f"gate.{name}", held, dtype=dtype)
            parameter[: len(rows)] = rows  # units that pad their number stay zero

    def read(self) -> SourceFiles:
        """What a checkpoint of it keeps beside the weights: a folder for each specialist, as it could be made again."""
        card = self.folder / "README.md"
        files = {CARD: card.read_bytes() if card.is_file() else f"# {self.folder.resolve().name}\n".encode()}
        sources = {}
        for name in self._entries:
            files |= {f"{SOURCES}/{name}/{place}": content for place, content in self._files(name).items()}
            origin = f"{self.folder}@specialist:{name}"
            sources[name] = Source(
                self.folder, origin, self.templates[name], self.element_types(f"specialists.{name}.")
            )
        return SourceFiles(files | write_record(sources, None))

    def _files(self, name: str) -> dict[str, bytes]:
        """Relative path -> content of what was this specialist's own folder, as far as the release holds it."""
        entry = self._entries[name]
        tokenizer = self.folder / entry.get("tokenizer", "")
        files = {file: (tokenizer / file).read_bytes() for file in _TOKENIZER if (tokenizer / file).is_file()}
        template = self.folder / "chat_templates" / f"{name}.jinja"
        if (text := entry["template"].get("chat_template")) is not None:
            files["chat_template.jinja"] = text.encode()
        elif template.is_file():
            files["chat_template.jinja"] = template.read_bytes()
        for path in sorted((self.folder / "chat_templates" / name).glob("*.jinja")):
            files[f"{ADDITIONAL}/{path.name}"] = path.read_bytes()
        if (licences := self.folder / "licenses" / name).is_dir():
            files |= beside_weights(licences)
        files["generation_config.json"] = (self.folder / "generation_config.json").read_bytes()
        files["config.json"] = (json.dumps(entry["config"], indent=2) + "\n").encode()
        return files

    def _template(self, name: str) -> str:
        fields = self._entries[name]["template"]
        if "chat_template" in fields:
            return "hf"
        for template in PAPER_TEMPLATES.values():
            if (fields["first"], fields["later"]) == (template.first, template.later):
                return template.name
        raise InputError(
            f"{self.folder / 'config.json'}: specialists.{name}.template = {fields!r} is none of "
            f"{', '.join(PAPER_TEMPLATES)}; write it as a chat_template"
        )


class _Part:
    """The tensors of a folder whose names begin with ``prefix``, under the rest of their names."""

    def __init__(self, tensors: TensorFolder, prefix: str) -> None:
        self._tensors, self._prefix = tensors, prefix

    def read(self, tensor: str, *part: Any, **options: Any) -> Tensor:
        return self._tensors.read(self._prefix + tensor, *part, **options)


class _ReleasedWeights(HFWeights):
    """A specialist's tensors, read as those of its own folder would be."""

    def __init__(self, tensors: TensorFolder, name: str, architecture: Architecture, dtype: torch.dtype) -> None:
        # Nothing to check here: check_release compared every tensor with the configuration.
        self.arch, self.dtype = architecture, dtype
        self.tensors = cast(TensorFolder, _Part(tensors, f"specialists.{name}."))
        self._head = HEAD  # a release ties no head
