"""Writes chunks by torch.distributed.checkpoint: one file per rank, its checksum taken on the way, one common index.

The form is PyTorch's own (``.metadata`` and ``__<rank>_0.distcp``), so its tools read it too.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType

from ultrafuser_mega.checkpoint.chunks import Chunk
from ultrafuser_mega.checkpoint.integrity import FileRecords


def write_chunks(folder: Path, chunks: Sequence[Chunk], group: dist.ProcessGroup) -> FileRecords:
    """Write every rank's chunks into ``folder``; collective over ``group``, which carries their description alone.

    Returns:
        Size and checksum of this rank's file.

    Raises:
        CheckpointException: a rank could not write its part; on every rank.
    """
    writer = _Writer(str(folder))
    dcp.save({}, storage_writer=writer, planner=_Planner(chunks), process_group=group)
    return writer.files.records


class _Planner(SavePlanner):
    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = {MetadataIndex(chunk.key, chunk.offsets): chunk for chunk in chunks}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None: ...

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_item(index, chunk) for index, chunk in self._chunks.items()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, index = create_default_global_save_plan(all_plans)
        for key, entry in index.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            written = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
            if written != math.prod(entry.size):
                raise RuntimeError(f"{key}: {written} elements would be written of {math.prod(entry.size)}")
        return plans, index

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._chunks[write_item.index].data


def _item(index: MetadataIndex, chunk: Chunk) -> WriteItem:
    return WriteItem(
        index=index,
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(chunk.offsets), chunk.data.shape),
            properties=TensorProperties(dtype=chunk.data.dtype),
            size=torch.Size(chunk.shape),
        ),
    )


class _Writer(FileSystemWriter):
    def __init__(self, folder: str) -> None:
        super().__init__(folder, per_thread_copy_ahead=0)  # all is in host memory: no stream, of no GPU, is needed
        self.fs = self.files = _Files()

    def storage_meta(self) -> None:
        """None: an identity drawn at random would make no two checkpoints of the same state equal."""


class _Files(FileSystem):
    """Notes size and checksum of what is written."""

    def __init__(self) -> None:
        self.records: FileRecords = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            summed = _Summed(cast(BinaryIO, stream))
            yield summed
        self.records[Path(path).name] = {"bytes": summed.size, "crc32": f"{summed.crc32:08x}"}

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class _Summed:
    """A file that is written from its beginning to its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.size, self.crc32 = file, 0, 0

    def write(self, data: Any) -> int:
        self.size += memoryview(data).nbytes
        self.crc32 = zlib.crc32(data, self.crc32)
        return self._file.write(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        self._file.flush()
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()
