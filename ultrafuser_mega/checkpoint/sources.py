"""Where a checkpoint's specialists came from, kept beside the weights so that they can leave as they came.

``sources/<name>/`` holds every file of the specialist's folder but its weights, sub-folders included, byte for byte;
``sources.json`` its origin, its template and the element type of each of its tensors; ``sources/config.yaml`` the
run's configuration, ``sources/data.json`` what data it had; ``sources/README.md`` the model card of the release that an
imported checkpoint came from.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ultrafuser_mega.checkpoint.left_out import LEFT_OUT
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.checkpoint.tensors import CheckpointTensors
from ultrafuser_mega.config import HEADS, FuserConfig, dump_config, load_config
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.hf_folder import TensorFolder

SOURCES, RECORD = "sources", "sources.json"
CONFIG, DATA, CARD = "sources/config.yaml", "sources/data.json", "sources/README.md"
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz"),
    *(".pkl", ".index.json"),
)
_LARGE = 100_000_000  # bytes


@dataclass(frozen=True)
class Sources:
    """What to keep with a checkpoint: name -> folder, name -> template; the configuration where there is one."""

    folders: Mapping[str, Path]
    templates: Mapping[str, str]
    config: FuserConfig | None

    @classmethod
    def of(cls, config: FuserConfig) -> Sources:
        """Those of a run."""
        return cls(config.folders, {name: s.template for name, s in config.specialists.items()}, config)

    def read(self, went_on_from: Path | None = None) -> SourceFiles:
        """All of it but the weights, into memory.

        Args:
            went_on_from: checkpoint of a run that is resumed. The weights are its, so it says in which element types
                they came; those in the folders may have become others since.

        Raises:
            InputError: a folder's safetensors cannot be read, or the checkpoint is damaged.
        """
        kept = read_sources(went_on_from) if went_on_from and (went_on_from / RECORD).is_file() else {}
        files: dict[str, bytes] = {}
        sources: dict[str, Source] = {}
        for name, folder in self.folders.items():
            files |= {f"{SOURCES}/{name}/{place}": content for place, content in beside_weights(folder).items()}
            types = kept[name].dtypes if name in kept else element_types(folder)
            sources[name] = Source(folder, str(folder), self.templates[name], types)
        return SourceFiles(files | write_record(sources, self.config))


def beside_weights(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of every file of a model folder but its weights; hidden sub-folders (.git) are left."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in _beside_weights(folder)}


def large_beside_weights(folder: Path) -> list[str]:
    """Of these files those that are larger than any tokenizer is, with their size in words."""
    sizes = {path: path.stat().st_size for path in _beside_weights(folder)}
    return [f"{path} ({size / 1e9:.2g} GB)" for path, size in sizes.items() if size > _LARGE]


def _beside_weights(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(place) / name for name in sorted(names)):
            if path.is_file() and not path.name.endswith(_WEIGHTS):
                yield path


def element_types(folder: Path) -> dict[str, torch.dtype]:
    """Tensor -> its element type in a model folder; raises InputError where its safetensors cannot be read."""
    tensors = TensorFolder(folder)
    return {tensor: tensors.dtype(tensor) for tensor in tensors.names()}


def rounding(dtypes: Mapping[str, torch.dtype], into: torch.dtype) -> str:
    """What is lost where tensors of these types become ``into``, in words; empty where ``into`` holds them all."""
    lost = Counter(_word(dtype) for dtype in dtypes.values() if torch.promote_types(dtype, into) != into)
    kinds = " and ".join(f"{count} {dtype} tensor{'s' * (count > 1)}" for dtype, count in lost.items())
    return f"{kinds} rounded to {_word(into)}" if kinds else ""


def write_record(sources: Mapping[str, Source], config: FuserConfig | None) -> dict[str, bytes]:
    """Path inside a checkpoint -> content of what :func:`read_sources` reads, and of the configuration if any."""
    record = {
        name: {
            "origin": source.origin,
            "template": source.template,
            "dtypes": {tensor: _word(dtype) for tensor, dtype in source.dtypes.items()},
        }
        for name, source in sources.items()
    }
    files = {RECORD: json.dumps(record, indent=1).encode()}
    return files if config is None else files | {CONFIG: dump_config(config).encode()}


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class SourceFiles:
    """Path inside a checkpoint -> content. Saving needs the specialists' folders no more: they may go away."""

    files: Mapping[str, bytes]

    @classmethod
    def of_checkpoint(cls, checkpoint: Path, config: FuserConfig, *, trained: Collection[str] | None) -> SourceFiles:
        """What the checkpoints keep of a run under ``config`` that takes its weights from ``checkpoint``.

        Args:
            checkpoint: a complete one of the same specialists.
            config: of the run.
            trained: for a run that begins with it: its specialists that were trained; their tensors come in the element
                types that they have in it. None for the run that wrote it, which goes on.

        Raises:
            InputError: the checkpoint keeps no sources, or cannot be read.
        """
        files: dict[str, bytes] = {}
        sources: dict[str, Source] = {}
        for name, source in read_sources(checkpoint).items():
            files |= {f"{SOURCES}/{name}/{at}": content for at, content in beside_weights(source.folder).items()}
            dtypes = source.dtypes if trained is None else held_types(checkpoint, source, trained=name in trained)
            sources[name] = Source(source.folder, source.origin, config.specialists[name].template, dtypes)
        return cls(files | write_record(sources, config))

    def with_left_out(self, record: bytes) -> SourceFiles:
        """The same together with what the run's checkpoints leave out (left_out.py)."""
        return SourceFiles({**self.files, LEFT_OUT: record})

    def with_data(self, record: Mapping[str, Any]) -> SourceFiles:
        """The same together with what the run says of its data (resume.py)."""
        return SourceFiles({**self.files, DATA: json.dumps(record, indent=1).encode()})

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


def held_type(came: torch.dtype, stored: torch.dtype, *, trained: bool) -> torch.dtype:
    """The element type of a tensor as it is now: what it came in, unless training or rounding made another of it."""
    return stored if trained or torch.promote_types(came, stored) != stored else came


def stored_type(tensors: CheckpointTensors) -> torch.dtype:
    """The element type of all of a checkpoint's weights, which is the gate's: small checkpoints have no others."""
    return tensors.dtype("gate.b1")


def trained_specialists(checkpoint: Path, progress: Progress) -> frozenset[str]:
    """Those whose own weights, head or adapters the run that wrote ``checkpoint`` has trained by then."""
    if not (checkpoint / CONFIG).is_file():  # imported, and nothing trained since
        return frozenset()
    config = load_config(checkpoint / CONFIG)
    found: set[str] = set()
    for number in config.stages:
        if (number, 0) < (progress.stage, progress.step):
            trained = [name for name, part in config.parts(number).items() if part.trains]
            found |= set(config.specialists) if HEADS in trained else set(config.specialists) & set(trained)
    return frozenset(found)


def held_types(checkpoint: Path, source: Source, *, trained: bool) -> dict[str, torch.dtype]:
    """Tensor -> :func:`held_type` of one specialist of ``checkpoint``; raises InputError where that is damaged."""
    stored = stored_type(CheckpointTensors(checkpoint))
    return {tensor: held_type(came, stored, trained=trained) for tensor, came in source.dtypes.items()}
