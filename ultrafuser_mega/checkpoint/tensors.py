"""Slices of single tensors of a checkpoint, read by one process without a model or a process group.

Megatron's torch_dist format is torch.distributed.checkpoint's: a pickled index (``.metadata``) and files of chunks,
each chunk a tensor as torch.save writes it. The index is unpickled with the few classes that it is made of and no
other, chunks with ``weights_only``. Never in memory: more than the slice asked for and a small piece of a chunk.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from ultrafuser_mega.errors import InputError

Slices = Sequence[slice]

_READ_AT_ONCE = 1 << 24
_INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta"),
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {
        "Size",
        "device",
        *(str(t).removeprefix("torch.") for t in vars(torch).values() if isinstance(t, torch.dtype)),
    },
}


def _enum_member(enum: Any, name: str) -> Enum:
    """What Python 3.11.0 to 3.11.3 pickle an enum's member as: getattr, here of enums alone."""
    if not (isinstance(enum, type) and issubclass(enum, Enum)):
        raise pickle.UnpicklingError(f"getattr of {enum!r} has no place in an index")
    return enum[name]


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in an index")


class CheckpointTensors:
    """The tensors of a checkpoint folder.

    Raises:
        InputError: the index is missing, damaged, or holds anything but an index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / ".metadata"
        try:
            with path.open("rb") as file:
                index = _IndexUnpickler(file).load()
        except FileNotFoundError:
            raise InputError(
                f"{folder}: not a checkpoint (no .metadata); expected what train or import wrote"
            ) from None
        except Exception as error:  # whatever damaged pickles make of themselves
            raise InputError(f"{path}: damaged checkpoint index ({error}); copy the checkpoint again") from None
        if not isinstance(index, Metadata):
            raise InputError(f"{path}: holds no checkpoint index; copy the checkpoint again")
        self._entries = {
            key: entry for key, entry in index.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
        }
        self._storage = index.storage_data
        self._fake = FakeTensorMode()
        self._checked: set[tuple[str, int]] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def names(self) -> list[str]:
        """Of all tensors."""
        return sorted(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, vocabulary padding included."""
        return tuple(self._entry(key).size)

    def dtype(self, key: str) -> torch.dtype:
        """Element type of a tensor."""
        return self._entry(key).properties.dtype

    def read(self, key: str, *slices: slice) -> Tensor:
        """``tensor[slices]``; every dimension beyond the given ones is read whole.

        Raises:
            InputError: the tensor is missing, or its bytes are; names the file.
        """
        entry = self._entry(key)
        whole = [*slices, *[slice(None)] * (len(entry.size) - len(slices))]
        ranges = [range(*part.indices(size)) for part, size in zip(whole, entry.size, strict=True)]
        result = torch.empty([len(span) for span in ranges], dtype=entry.properties.dtype)
        filled = 0
        for chunk in entry.chunks:
            spans = [
                (max(span.start, start), min(span.stop, start + size))
                for span, start, size in zip(ranges, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(start >= stop for start, stop in spans):
                continue
            target = result[_within(spans, [span.start for span in ranges])]
            self._read_chunk(key, chunk.offsets, chunk.sizes, _within(spans, chunk.offsets), target)
            filled += target.numel()
        if filled != result.numel():
            raise InputError(f"{self.folder}: {filled} of {result.numel()} elements of {key} are there; copy it again")
        return result

    def _entry(self, key: str) -> TensorStorageMetadata:
        if key not in self._entries:
            raise InputError(f"{self.folder}: checkpoint lacks the tensor {key}")
        return self._entries[key]

    def _read_chunk(self, key: str, offsets: torch.Size, sizes: torch.Size, part: Slices, target: Tensor) -> None:
        """``target[:] = chunk[part]``."""
        place = self._storage.get(MetadataIndex(key, offsets))
        if place is None:
            raise InputError(f"{self.folder / '.metadata'}: names no file for {key} at {tuple(offsets)}")
        path = self.folder / place.relative_path
        try:
            with path.open("rb") as file:
                view = io.BufferedReader(_Part(file, place.offset, place.length), 1 << 20)
                self._check_once(view, (place.relative_path, place.offset))
                view.seek(0)
                with self._fake:  # the numbers stay in the file; noted is where they begin
                    chunk = torch.load(view, weights_only=True)
                if chunk.shape != sizes or not chunk.is_contiguous() or chunk.storage_offset():
                    raise ValueError(f"shape {tuple(chunk.shape)} there, {tuple(sizes)} in the index")
                start = place.offset + chunk.untyped_storage()._checkpoint_offset
                _copy(file, start, sizes, chunk.dtype, part, target)
        except FileNotFoundError:
            raise InputError(f"{path}: missing; it holds {key}") from None
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise InputError(f"{path}: damaged where it holds {key} ({reason}); copy the checkpoint again") from None

    def _check_once(self, chunk: BinaryIO, place: tuple[str, int]) -> None:
        """torch.save's archives carry a CRC-32, which torch.load does not look at."""
        if place in self._checked:
            return
        with zipfile.ZipFile(chunk) as archive:
            if (record := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {record} is another")
        self._checked.add(place)


class _Part(io.RawIOBase):
    """Bytes ``start`` to ``start + size`` of a file as a file."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _copy(file: BinaryIO, start: int, sizes: Sequence[int], dtype: torch.dtype, part: Slices, target: Tensor) -> None:
    """``target[:] = stored[part]`` for a contiguous tensor stored from byte ``start`` on, piece by piece."""
    first, *rest = part
    row = math.prod(sizes[1:]) * dtype.itemsize
    whole = all(inner == slice(0, size) for inner, size in zip(rest, sizes[1:], strict=True))
    if rest and (row > _READ_AT_ONCE or not whole):
        for index in range(first.start, first.stop):
            _copy(file, start + index * row, sizes[1:], dtype, rest, target[index - first.start])
        return
    for begin in range(first.start, first.stop, _READ_AT_ONCE // row):
        piece = target[begin - first.start :][: _READ_AT_ONCE // row]
        data = bytearray(len(piece) * row)
        file.seek(start + begin * row)
        if file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise ValueError("ends too early")
        piece.copy_(torch.frombuffer(data, dtype=dtype).view(piece.shape))


def _within(spans: Sequence[tuple[int, int]], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start - zero, stop - zero) for (start, stop), zero in zip(spans, origin, strict=True))
