"""Where a checkpoint's specialists came from, kept beside the weights so that they can leave as they came.

``sources/<name>/`` holds every file of the specialist's folder but its weights, byte for byte; ``sources.json`` its
origin, its template and the element type of each of its tensors; ``sources/config.yaml`` the run's configuration,
``sources/data.json`` what data it had.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ultrafuser_mega.config import FuserConfig, dump_config
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.hf_folder import TensorFolder

SOURCES, RECORD = "sources", "sources.json"
CONFIG, DATA = "sources/config.yaml", "sources/data.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


@dataclass(frozen=True)
class Sources:
    """What to keep with a checkpoint: name -> folder, name -> template; of a run, its configuration and data too."""

    folders: Mapping[str, Path]
    templates: Mapping[str, str]
    config: FuserConfig | None
    data: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, config: FuserConfig, data: Mapping[str, Any] | None = None) -> Sources:
        """Those of a run."""
        return cls(config.folders, {name: s.template for name, s in config.specialists.items()}, config, data)

    def read(self) -> SourceFiles:
        """All of it but the weights, into memory.

        Raises:
            InputError: a folder's safetensors cannot be read.
        """
        files, record = {}, {}
        for name, folder in self.folders.items():
            for path in sorted(folder.iterdir()):
                if path.is_file() and not path.name.endswith(_WEIGHTS):
                    files[f"{SOURCES}/{name}/{path.name}"] = path.read_bytes()
            tensors = TensorFolder(folder)
            dtypes = {tensor: str(tensors.dtype(tensor)).removeprefix("torch.") for tensor in tensors.names()}
            record[name] = {"origin": str(folder), "template": self.templates[name], "dtypes": dtypes}
        files[RECORD] = json.dumps(record, indent=1).encode()
        if self.config is not None:
            files[CONFIG] = dump_config(self.config).encode()
        if self.data is not None:
            files[DATA] = json.dumps(self.data, indent=1).encode()
        return SourceFiles(files)


@dataclass(frozen=True)
class SourceFiles:
    """Path inside a checkpoint -> content. Saving needs the specialists' folders no more: they may go away."""

    files: Mapping[str, bytes]

    def write(self, checkpoint: Path) -> None:
        """Write into ``checkpoint``, which must exist."""
        for name, content in self.files.items():
            (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
            (checkpoint / name).write_bytes(content)


@dataclass(frozen=True)
class Source:
    """One specialist as it was kept.

    Attributes:
        folder: its files but the weights, inside the checkpoint.
        origin: where it was read from.
        template: of its conversations.
        dtypes: Hugging Face tensor -> element type that it came with.
    """

    folder: Path
    origin: str
    template: str
    dtypes: dict[str, torch.dtype]


def read_sources(checkpoint: Path) -> dict[str, Source]:
    """Name -> what the checkpoint keeps of that specialist, in the order of the gate weights.

    Raises:
        InputError: the checkpoint keeps no sources, or they are damaged.
    """
    path = checkpoint / RECORD
    try:
        record = json.loads(path.read_text())
        sources = {
            name: Source(
                checkpoint / SOURCES / name,
                entry["origin"],
                entry["template"],
                {tensor: getattr(torch, dtype) for tensor, dtype in entry["dtypes"].items()},
            )
            for name, entry in record.items()
        }
    except FileNotFoundError:
        raise InputError(
            f"{checkpoint}: has no {RECORD}; expected a checkpoint folder that ultrafuser train or import wrote"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({error!r}); copy the checkpoint again") from None
    for name, source in sources.items():
        if not source.folder.is_dir():
            raise InputError(f"{source.folder}: missing, though {path.name} names {name}; copy the checkpoint again")
    return sources
