"""Saving while training goes on: a copy is taken at once, a thread writes it and gives it its name.

At most one save is under way. Ranks exchange objects over a gloo group of the saver's own, so that nothing meets the
training's collectives; what training waits for is the copy, and a save that has not ended when the next one begins.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import accumulate
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
from ultrafuser_mega.checkpoint.unfinished import alone, finish, unfinished_of
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.runtime.gloo import IN_ORDER

#: Name of the link to the checkpoint of the lowest held-out loss.
BEST = "best"
_BLOCK = 1 << 30  # bytes
_ALIGNED = 64


class Saver:
    """Writes a run's checkpoints; building one is collective over the job.

    Args:
        folder: receives them.
        keep: how many of the newest stay.
        keep_every: those whose step of the stage is a multiple of it stay too; 0: none.
        identity: description of the model, checked on reading.
        sources: what they keep of the specialists; rank 0's, others need none.

    Attributes:
        seconds: from the call to the checkpoint's final name, of the last one that was written; 0: none yet.
    """

    def __init__(
        self, folder: Path, keep: int, keep_every: int, identity: Mapping[str, Any], sources: SourceFiles | None
    ) -> None:
        self._folder, self._keep, self._keep_every = folder, keep, keep_every
        self._identity, self._sources = identity, sources
        self._group = dist.new_group(backend=IN_ORDER, group_desc="saving")
        self._copies: list[Tensor] = []
        self._thread: threading.Thread | None = None
        self._news: deque[str] = deque()
        self._problem: str | None = None
        self._error: BaseException | None = None
        self.seconds = 0.0

    def save(self, progress: Progress, chunks: Sequence[Chunk], *, best: bool = False) -> None:
        """Begin to write ``chunks`` as ``stage<k>-step<s>``; collective. They may change when this returns.

        ``best``: the link ``best`` points to it then, and it stays until another one is.
        """
        self.wait()
        begun = time.monotonic()
        copied = self._copied(chunks)
        write = partial(self._write, progress, copied, begun, best)
        self._thread = threading.Thread(target=write, name="saving", daemon=True)
        self._thread.start()

    def is_best(self, progress: Progress) -> None:
        """The same for a checkpoint that is there: of a run that ended before it was known, and goes on from it."""
        if dist.get_rank() == 0 and (self._folder / progress.folder).is_dir():
            _point(self._folder / BEST, progress.folder)

    def wait(self) -> str | None:
        """Until nothing is under way; why the last save failed, if it did: the same on every rank."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error
        problem, self._problem = self._problem, None
        return problem

    @property
    def is_writing(self) -> bool:
        """Whether a save is under way on this rank."""
        return self._thread is not None and self._thread.is_alive()

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

    def _write(self, progress: Progress, chunks: Sequence[Chunk], begun: float, best: bool) -> None:
        final = self._folder / progress.folder
        unfinished, is_first = unfinished_of(final), dist.get_rank() == 0
        try:
            with ExitStack() as held:
                with same_everywhere(final, self._group):
                    if is_first:
                        held.enter_context(_emptied(unfinished))
                write_checkpoint(unfinished, final, progress, chunks, self._group, self._identity, self._sources)
                with same_everywhere(final, self._group):
                    if is_first:
                        remove_checkpoint(final)
                        finish(unfinished, final)
                        if best:
                            _point(self._folder / BEST, final.name)
                        self._remove_old(progress)
            self.seconds = time.monotonic() - begun
            self._news.append(f"checkpoint {final}")
        except InputError as problem:
            self._problem = str(problem)
            self._news.append(f"{problem}; training goes on")
        except BaseException as error:  # raised where training asks for the save
            self._error = error

    def _remove_old(self, written: Progress) -> None:
        # A newer one is damaged, or the run would not have gone on from before it: it stands for none that is kept.
        link = self._folder / BEST
        best = link.readlink().name if link.is_symlink() else ""
        until_now = [found for found in list_checkpoints(self._folder) if found[0] <= written]
        for progress, old in until_now[: -self._keep]:
            if old.name != best and not (self._keep_every and progress.step % self._keep_every == 0):
                remove_checkpoint(old)


def _point(link: Path, name: str) -> None:
    """Make ``link`` one to its neighbour ``name``; whoever looks finds the old one or the new one."""
    draft = link.with_name(f".{link.name}.tmp")
    draft.unlink(missing_ok=True)
    draft.symlink_to(name)
    draft.replace(link)


@contextmanager
def _emptied(partial: Path) -> Iterator[None]:
    """A folder for this process alone; what interrupted saves have left beside it is removed, and it where this fails.

    Raises:
        InputError: another process writes to this name.
    """
    partial.parent.mkdir(parents=True, exist_ok=True)
    for unfinished in partial.parent.glob(".*.partial"):
        with suppress(InputError), alone(unfinished):  # another process is at it
            shutil.rmtree(unfinished)
    partial.mkdir(exist_ok=True)
    with alone(partial):
        try:
            yield
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # what a full disk needs
            raise


def copies_for(chunks: Sequence[Chunk]) -> list[Tensor]:
    """Host memory for a copy of each, pinned where they lie on a GPU; in blocks: what is pinned has a power of two."""
    copies: list[Tensor] = []
    for block in _blocks(chunks):
        places = list(accumulate(map(_room, block), initial=0))
        room = torch.empty(places[-1], dtype=torch.uint8)
        room = room.pin_memory() if block[0].data.is_cuda else room
        for chunk, place in zip(block, places, strict=False):
            data = room[place : place + chunk.data.numel() * chunk.data.element_size()]
            copies.append(data.view(chunk.data.dtype).view(chunk.data.shape))
    return copies


def _blocks(chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    block: list[Chunk] = []
    size = 0
    for chunk in chunks:
        if block and size + _room(chunk) > _BLOCK:
            yield block
            block, size = [], 0
        block.append(chunk)
        size += _room(chunk)
    if block:
        yield block


def _room(chunk: Chunk) -> int:
    """Bytes that its copy takes, so that the next one's place suits any element type."""
    return -(-chunk.data.numel() * chunk.data.element_size() // _ALIGNED) * _ALIGNED
