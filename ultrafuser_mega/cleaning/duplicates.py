"""Texts that stand in the data more than once: word by word, or nearly so.

near = NearDuplicates(0.7)
if (match := near.match(text)) is None:
    near.add(key, text)
else:
    print(match.key, match.similarity)

Similarity is Jaccard's, of the sets of three successive words. MinHash signatures in a locality-sensitive index (rensa)
find whom to compare a text with; what decides is the similarity itself, so no pair below the threshold is ever matched.
The index misses a pair right at the threshold with a probability of at most 1 in 20, more similar ones more rarely. Of
very many that it finds, as among exercises of one template, those whose signatures are most alike are compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ultrafuser_mega.cleaning.words import words
from ultrafuser_mega.errors import InputError

_SHINGLE = 3  # words
_SIGNATURE = 128  # hashes of a MinHash signature
_MISSED = 0.05  # of pairs right at the threshold, at most
_SEED = 1
_COMPARED = 64  # texts that one is compared with, at most


def digest_of(parts: Iterable[str]) -> int:
    """64 bits that texts with the same words share; among ten million others two do with a probability of 3e-6."""
    hashed = hashlib.blake2b(digest_size=8)
    for part in parts:
        hashed.update(" ".join(words(part) or [part.strip()]).encode("utf-8", "surrogatepass"))
        hashed.update(b"\0")
    return int.from_bytes(hashed.digest(), "little")


@dataclass(frozen=True, slots=True)
class Match:
    """The earlier text that is most similar: its key, and how similar it is (0 to 1)."""

    key: str
    similarity: float


class NearDuplicates:
    """Texts seen so far, asked for the one that is most similar to another.

    Args:
        threshold: the least similarity of a match, above 0, at most 1.

    Raises:
        InputError: another threshold, or rensa is not installed.
    """

    def __init__(self, threshold: float = 0.7) -> None:
        if not 0 < threshold <= 1:
            raise InputError(f"near duplicates: similarity {threshold}; expected a number above 0, at most 1")
        try:
            import rensa
        except ImportError:
            raise InputError(
                "near duplicates are found by rensa, which is not installed; pip install 'ultrafuser_mega[synthesis]'"
            ) from None
        self.threshold = threshold
        self._signature = rensa.RMinHash
        self._index = rensa.RMinHashLSH(threshold, _SIGNATURE, _bands(threshold))
        self._keys: list[str] = []
        self._shingles: list[np.ndarray] = []
        self._signatures = np.zeros((1024, _SIGNATURE), np.uint32)  # of the first len(self) texts

    def __len__(self) -> int:
        return len(self._keys)

    def match(self, text: str) -> Match | None:
        """The most similar text so far, the earliest of several; None: none is similar enough."""
        return self._match(*self._sketch(text))

    def add(self, key: str, text: str) -> None:
        """Keep a text in mind under a name that matches are told by."""
        self._add(key, *self._sketch(text))

    def match_or_add(self, key: str, text: str) -> Match | None:
        """``match``, and ``add`` where there is none, for the price of one of them."""
        sketch = self._sketch(text)
        found = self._match(*sketch)
        if found is None:
            self._add(key, *sketch)
        return found

    def _sketch(self, text: str) -> tuple[np.ndarray, Any]:
        """(the sorted hashes of its shingles, its signature)."""
        found = words(text)
        shingles = set(map(" ".join, zip(*(found[start:] for start in range(_SHINGLE)), strict=False)))
        tokens = list(shingles) or [" ".join(found) or text.strip()]
        signature = self._signature(_SIGNATURE, _SEED)
        signature.update(tokens)
        # Python's hashes differ between processes, but are only compared within this one.
        return np.sort(np.fromiter(map(hash, tokens), np.int64, len(tokens))), signature

    def _match(self, shingles: np.ndarray, signature: Any) -> Match | None:
        best, where = 0.0, -1
        for place in self._likeliest(signature):
            other = self._shingles[place]
            if min(len(shingles), len(other)) < self.threshold * max(len(shingles), len(other)):
                continue
            shared = len(np.intersect1d(shingles, other, assume_unique=True))
            similarity = shared / (len(shingles) + len(other) - shared)
            if similarity > best:
                best, where = similarity, place
        return Match(self._keys[where], best) if best >= self.threshold else None

    def _likeliest(self, signature: Any) -> list[int]:
        """Places of the texts to compare with, the earliest first."""
        places = sorted(self._index.query(signature))
        if len(places) <= _COMPARED:
            return places
        alike = (self._signatures[places] == np.array(signature.digest(), np.uint32)).sum(axis=1)
        return sorted(places[at] for at in np.argsort(-alike, kind="stable")[:_COMPARED])

    def _add(self, key: str, shingles: np.ndarray, signature: Any) -> None:
        count = len(self._keys)
        if count == len(self._signatures):
            self._signatures = np.concatenate([self._signatures, np.zeros_like(self._signatures)])
        self._signatures[count] = signature.digest()
        self._index.insert(count, signature)
        self._keys.append(key)
        self._shingles.append(shingles)


def _bands(threshold: float) -> int:
    """As few bands of as many hashes as find a pair right at the threshold often enough."""
    bands = 1
    while bands < _SIGNATURE and (1 - threshold ** (_SIGNATURE // bands)) ** bands > _MISSED:
        bands *= 2
    return bands
