"""Saving while training goes on: a copy is taken at once, a thread writes it and gives it its name.

At most one save is under way. Ranks exchange objects over a gloo group of the saver's own, so that nothing meets the
training's collectives; what training waits for is the copy, and a save that has not ended when the next one begins.
"""

from __future__ import annotations

import shutil
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultrafuser_mega.checkpoint.checkpoint import (
    Progress,
    list_checkpoints,
    remove_checkpoint,
    same_everywhere,
    write_checkpoint,
)
from ultrafuser_mega.checkpoint.chunks import Chunk
from ultrafuser_mega.checkpoint.sources import SourceFiles
from ultrafuser_mega.errors import InputError


class Saver:
    """Writes a run's checkpoints; building one is collective over the job.

    Args:
        folder: receives them.
        keep: how many of the newest stay.
        keep_every: those whose step of the stage is a multiple of it stay too; 0: none.
        identity: description of the model, checked on reading.
        sources: what they keep of the specialists; rank 0's, others need none.
    """

    def __init__(
        self, folder: Path, keep: int, keep_every: int, identity: Mapping[str, Any], sources: SourceFiles | None
    ) -> None:
        self._folder, self._keep, self._keep_every = folder, keep, keep_every
        self._identity, self._sources = identity, sources
        self._group = dist.new_group(backend="gloo", group_desc="saving")
        self._copies: list[Tensor] = []
        self._thread: threading.Thread | None = None
        self._news: deque[str] = deque()
        self._problem: str | None = None
        self._error: BaseException | None = None

    def save(self, progress: Progress, chunks: Sequence[Chunk]) -> None:
        """Begin to write ``chunks`` as ``stage<k>-step<s>``; collective. They may change when this returns."""
        self.wait()
        copied = self._copied(chunks)
        self._thread = threading.Thread(target=self._write, args=(progress, copied), name="saving", daemon=True)
        self._thread.start()

    def wait(self) -> str | None:
        """Until nothing is under way; why the last save failed, if it did: the same on every rank."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error
        problem, self._problem = self._problem, None
        return problem

    def news(self) -> Iterator[str]:
        """What has become of saves since the last call, a line each."""
        while self._news:
            yield self._news.popleft()

    def _copied(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """In host memory, which the next save uses again."""
        wanted = [(chunk.data.shape, chunk.data.dtype) for chunk in chunks]
        if [(copy.shape, copy.dtype) for copy in self._copies] != wanted:
            self._copies = copies_for(chunks)
        for copy, chunk in zip(self._copies, chunks, strict=True):
            copy.copy_(chunk.data, non_blocking=True)
        for device in {chunk.data.device for chunk in chunks if chunk.data.is_cuda}:
            torch.cuda.synchronize(device)
        return [replace(chunk, data=copy) for chunk, copy in zip(chunks, self._copies, strict=True)]

    def _write(self, progress: Progress, chunks: Sequence[Chunk]) -> None:
        final, partial = self._folder / progress.folder, self._folder / f".{progress.folder}.partial"
        is_first = dist.get_rank() == 0
        try:
            with same_everywhere(final, self._group):
                if is_first:
                    for unfinished in self._folder.glob(".*.partial"):
                        shutil.rmtree(unfinished)
                    partial.mkdir(parents=True)
            write_checkpoint(partial, final, progress, chunks, self._group, self._identity, self._sources)
            with same_everywhere(final, self._group):
                if is_first:
                    remove_checkpoint(final)
                    partial.rename(final)
                    self._remove_old(progress)
            self._news.append(f"checkpoint {final}")
        except InputError as problem:
            self._problem = str(problem)
            self._news.append(f"{problem}; training goes on")
            if is_first:
                shutil.rmtree(partial, ignore_errors=True)  # what a full disk needs
        except BaseException as error:  # raised where training asks for the save
            self._error = error

    def _remove_old(self, written: Progress) -> None:
        # A newer one is damaged, or the run would not have gone on from before it: it stands for none that is kept.
        until_now = [found for found in list_checkpoints(self._folder) if found[0] <= written]
        for progress, old in until_now[: -self._keep]:
            if not (self._keep_every and progress.step % self._keep_every == 0):
                remove_checkpoint(old)


def copies_for(chunks: Sequence[Chunk]) -> list[Tensor]:
    """Host memory for a copy of each, pinned where they lie on a GPU."""
    room = [torch.empty(chunk.data.shape, dtype=chunk.data.dtype) for chunk in chunks]
    return [empty.pin_memory() if chunk.data.is_cuda else empty for empty, chunk in zip(room, chunks, strict=True)]
