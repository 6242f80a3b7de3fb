"""The token store on disk, as the trainer reads it: memory-mapped, checksummed, random access.

A store is a folder with ``manifest.json``, ``dropped.jsonl`` (every row that was left out, and why) and,
per class and split, a folder ``<class>/<split>/`` of flat arrays:

    responses.bin                   tokens of all responses, one after the other     uint16 | uint32
    prompts.<specialist>.bin        tokens of all its prompts                        uint16 | uint32
    turns.bin                       (samples + 1) first turn of each sample          int64
    response_offsets.bin            (turns + 1)   into responses.bin                 int64
    prompt_offsets.<specialist>.bin (turns + 1)   into prompts.<specialist>.bin      int64

Tokens are uint16 where the shared vocabulary allows. Responses stand there once, whatever the number
of specialists. Arrays are little-endian. Writing is store_writer.py's work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ultrafuser_mega.errors import InputError

FORMAT_VERSION = 3  # also goes up when the same rows are read otherwise
MANIFEST = "manifest.json"
DROPPED = "dropped.jsonl"
SPLITS = ("train", "heldout")
OFFSET_DTYPE = np.dtype("<i8")

Ids = np.ndarray  # (k,) uint16 | uint32, a view into the mapped file


class Sample:
    """One conversation of a split; ``prompts[s][t]`` and ``responses[t]`` are the ids of trained turn t.

    The sequence of specialist s is prompts[s][0], responses[0], prompts[s][1], responses[1], ...
    """

    __slots__ = ("index", "split")

    def __init__(self, split: Split, index: int) -> None:
        self.split = split
        self.index = index

    @property
    def turns(self) -> range:
        return range(int(self.split.turns[self.index]), int(self.split.turns[self.index + 1]))

    @property
    def responses(self) -> list[Ids]:
        return _pieces(self.split.responses, self.split.response_offsets, self.turns)

    @property
    def prompts(self) -> dict[str, list[Ids]]:
        return {name: self.prompts_of(name) for name in self.split.specialists}

    def prompts_of(self, specialist: str) -> list[Ids]:
        return _pieces(self.split.prompts[specialist], self.split.prompt_offsets[specialist], self.turns)

    @property
    def response_tokens(self) -> int:
        return int(self.split.response_tokens([self.index])[0])

    def length(self, specialist: str) -> int:
        """Tokens of its whole sequence."""
        return int(self.split.lengths(specialist, [self.index])[0])


class Split(Sequence[Sample]):
    """The train or held-out samples of one class; the arrays are those of the module's docstring."""

    def __init__(self, folder: Path, specialists: Sequence[str], token_dtype: np.dtype) -> None:
        self.specialists = tuple(specialists)
        self.turns = _map(folder / "turns.bin", OFFSET_DTYPE)
        self.responses = _map(folder / "responses.bin", token_dtype)
        self.response_offsets = _map(folder / "response_offsets.bin", OFFSET_DTYPE)
        self.prompts = {name: _map(folder / f"prompts.{name}.bin", token_dtype) for name in specialists}
        self.prompt_offsets = {name: _map(folder / f"prompt_offsets.{name}.bin", OFFSET_DTYPE) for name in specialists}

    def __len__(self) -> int:
        return len(self.turns) - 1

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # no slices: nobody needs them
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return Sample(self, index % len(self))

    def response_tokens(self, indexes: Sequence[int] | np.ndarray) -> np.ndarray:
        """(k,) int64: response tokens of each of k samples, all turns together."""
        return self._spans(self.response_offsets, indexes)

    @property
    def all_response_tokens(self) -> int:
        """Of all samples together."""
        return int(self.response_offsets[self.turns[-1]] - self.response_offsets[self.turns[0]])

    def lengths(self, specialist: str, indexes: Sequence[int] | np.ndarray) -> np.ndarray:
        """(k,) int64: tokens of the specialist's whole sequence, for each of k samples."""
        return self._spans(self.prompt_offsets[specialist], indexes) + self.response_tokens(indexes)

    def max_lengths(self, indexes: Sequence[int] | np.ndarray) -> np.ndarray:
        """(k,) int64: the longest sequence over all specialists, for each of k samples."""
        prompts = [self._spans(offsets, indexes) for offsets in self.prompt_offsets.values()]
        return np.maximum.reduce(prompts) + self.response_tokens(indexes)

    def _spans(self, offsets: np.ndarray, indexes: Sequence[int] | np.ndarray) -> np.ndarray:
        at = np.asarray(indexes, dtype=np.int64)
        return offsets[self.turns[at + 1]] - offsets[self.turns[at]]


class TokenStore:
    """An opened store. ``manifest`` is the decoded manifest.json (described in store_writer.py)."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.class_names: tuple[str, ...] = tuple(manifest["classes"])
        self.specialists: tuple[str, ...] = tuple(manifest["specialists"])
        self.vocab_size: int = manifest["vocab_size"]
        self.max_length: int = manifest["max_length"]
        self.bos_id: int | None = manifest["bos_id"]
        self.eos_id: int = manifest["eos_id"]
        self._splits: dict[tuple[str, str], Split] = {}

    @property
    def fingerprint(self) -> str:
        """Digest of all that the store was made from: two stores of one fingerprint hold the same samples.

        The contents of the data files and how they are read, held-out rows, templates, tokenizers, vocabulary,
        max_length and the format; not names or places of files.
        """
        fingerprint: str = self.manifest["fingerprint"]
        return fingerprint

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> TokenStore:
        """Open a finished store.

        Every file's size is always compared with the manifest; ``verify`` also reads every byte and
        compares checksums (one rank of a job is enough). Raises InputError naming the damaged file.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        for name, split in ((name, split) for name in manifest["classes"] for split in SPLITS):
            for file, expected in manifest["splits"][name][split]["files"].items():
                check_file(folder / name / split / file, expected, verify)
        return cls(folder, manifest)

    def entry_samples(self, class_name: str, entries: int) -> list[int]:
        """Training samples of each of a class's ``entries`` (files, folders, globs), in the order of the samples.

        Raises:
            InputError: an earlier version made the store, which noted none.
        """
        noted = self.manifest["splits"][class_name]["train"].get("entries", [])
        if len(noted) != entries:
            raise InputError(
                f"{self.folder}: does not say which samples of {class_name} came from which of its entries; "
                "prepare the data again, with --overwrite"
            )
        return [int(samples) for samples in noted]

    def split(self, class_name: str, split: str) -> Split:
        """``split`` is "train" or "heldout"; the latter may be empty."""
        if class_name not in self.class_names:
            raise InputError(f'{self.folder} has no class "{class_name}"; it has {", ".join(self.class_names)}')
        if split not in SPLITS:
            raise InputError(f'{self.folder} has no split "{split}"; expected one of {", ".join(SPLITS)}')
        key = (class_name, split)
        if key not in self._splits:
            dtype = np.dtype(self.manifest["token_dtype"])
            self._splits[key] = Split(self.folder / class_name / split, self.specialists, dtype)
        return self._splits[key]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished store, its own checksum verified. Raises InputError."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; is {folder} a token store?") from None
    except ValueError:
        raise InputError(f"{path}: damaged: it is not valid JSON; prepare the data again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT_VERSION:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise InputError(f"{path}: format {found!r}, expected {FORMAT_VERSION}; prepare the data again")
    if manifest.pop("checksum", None) != digest(manifest):
        raise InputError(f"{path}: damaged: its checksum does not match; prepare the data again")
    return manifest


def digest(value: Any) -> str:
    """A hash of a JSON value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def check_file(path: Path, expected: dict[str, Any], verify: bool) -> None:
    """Against what the manifest says of it, its bytes too if ``verify``; raises InputError."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: missing from the token store: {error.strerror}; prepare the data again") from None
    if size != expected["bytes"]:
        wanted = expected["bytes"]
        raise InputError(f"{path}: damaged: {size} bytes, the manifest says {wanted}; prepare the data again")
    if verify and hash_file(path) != expected["blake2b"]:
        raise InputError(f"{path}: damaged: its checksum does not match; prepare the data again")


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


def _pieces(flat: np.ndarray, offsets: np.ndarray, turns: range) -> list[Ids]:
    bounds = offsets[turns.start : turns.stop + 1].tolist()
    return [flat[start:end] for start, end in pairwise(bounds)]
