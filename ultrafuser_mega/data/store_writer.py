"""Writing the arrays of a token store (store.py describes them) and its manifest.

Arrays are appended to as batches arrive and hashed on the way, so memory does not grow with the data.
The manifest is written last; a folder without one is no store.

    format, fingerprint, inputs     what the store was made from (prepare.py): compared before reuse
    classes, specialists            names; per specialist its template (name, text) and tokenizer hash
    vocab_size, max_length, bos_id, token_dtype
    eos_id, response_lead           what stands behind and before every response (templates.ResponseFormat)
    splits.<class>.<split>          rows, kept, samples (a kept row gives one or several), cut,
                                    dropped {reason: count}, unread {field: rows},
                                    repeated (train: rows that repeat an earlier one; heldout: that are trained
                                    on as well), turns (trained ones), response_tokens,
                                    prompt_tokens {specialist: count}, files {name: {bytes, blake2b}},
                                    entries (of train: samples of each entry of data.classes.<class>.train)
    checksum                        of all of the above
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ultrafuser_mega.data.align import Aligned
from ultrafuser_mega.data.store import MANIFEST, OFFSET_DTYPE, digest


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id of the vocabulary."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class SplitWriter:
    """Appends aligned samples to the arrays of one class and split; as a context, closes them in the end."""

    def __init__(self, folder: Path, specialists: Sequence[str], dtype: np.dtype) -> None:
        folder.mkdir(parents=True)
        self.specialists = tuple(specialists)
        self.samples = 0
        self._turns = _Offsets(folder / "turns.bin")
        self._responses = _Ragged(folder / "responses.bin", folder / "response_offsets.bin", dtype)
        self._prompts = {
            name: _Ragged(folder / f"prompts.{name}.bin", folder / f"prompt_offsets.{name}.bin", dtype)
            for name in specialists
        }

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *_: object) -> None:
        ragged = (self._responses, *self._prompts.values())
        for file in chain([self._turns], *(one.parts for one in ragged)):
            file.file.close()

    def add(self, conversations: Sequence[Aligned]) -> None:
        """Every sequence of a conversation becomes a sample."""
        bounds = [(*aligned.starts, len(aligned.responses)) for aligned in conversations]
        turns = [end - start for of_one in bounds for start, end in pairwise(of_one)]
        self.samples += len(turns)
        self._turns.add(turns)
        self._responses.add([ids for aligned in conversations for ids in aligned.responses])
        for name, prompts in self._prompts.items():
            prompts.add([ids for aligned in conversations for ids in aligned.prompts[name]])

    def close(self) -> dict[str, Any]:
        """Finish the files; this split's part of the manifest (sizes, token counts, checksums)."""
        files = dict(
            chain(
                [self._turns.close()],
                self._responses.close(),
                *(self._prompts[name].close() for name in self.specialists),
            )
        )
        return {
            "turns": self._turns.end,
            "response_tokens": self._responses.tokens,
            "prompt_tokens": {name: self._prompts[name].tokens for name in self.specialists},
            "files": files,
        }


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write and sync the manifest with its own checksum."""
    with (folder / MANIFEST).open("w", encoding="ascii") as file:
        json.dump({**manifest, "checksum": digest(manifest)}, file, indent=1, ensure_ascii=True)
        file.flush()
        os.fsync(file.fileno())


class _HashedFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("wb")
        self.hash = hashlib.blake2b(digest_size=16)
        self.bytes = 0

    def write(self, array: np.ndarray) -> None:
        data = array.tobytes()
        self.file.write(data)
        self.hash.update(data)
        self.bytes += len(data)

    def close(self) -> tuple[str, dict[str, Any]]:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return self.path.name, {"bytes": self.bytes, "blake2b": self.hash.hexdigest()}


class _Offsets(_HashedFile):
    """Running sums of the lengths added, with the leading zero."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.end = 0
        self.write(np.zeros(1, OFFSET_DTYPE))

    def add(self, lengths: Sequence[int]) -> None:
        if lengths:
            ends = np.cumsum(np.asarray(lengths, OFFSET_DTYPE)) + self.end
            self.end = int(ends[-1])
            self.write(ends.astype(OFFSET_DTYPE))


class _Ragged:
    """Token lists one after the other, and where each ends."""

    def __init__(self, tokens_path: Path, offsets_path: Path, dtype: np.dtype) -> None:
        self._tokens = _HashedFile(tokens_path)
        self._offsets = _Offsets(offsets_path)
        self._dtype = dtype

    @property
    def parts(self) -> tuple[_HashedFile, _HashedFile]:
        return self._tokens, self._offsets

    @property
    def tokens(self) -> int:
        return self._offsets.end

    def add(self, lists: Sequence[list[int]]) -> None:
        total = sum(map(len, lists))
        self._tokens.write(np.fromiter(chain.from_iterable(lists), self._dtype, count=total))
        self._offsets.add([len(ids) for ids in lists])

    def close(self) -> Iterable[tuple[str, dict[str, Any]]]:
        return [part.close() for part in self.parts]
