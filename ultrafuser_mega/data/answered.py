"""Samples whose responses a model gave: in memory, as a token store's splits are read.

Prompts are those of samples of a store, each up to its first response; the answer's tokens stand behind every
specialist's own prompt, as those of a response do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np

from ultrafuser_mega.data.sampler import Pick
from ultrafuser_mega.data.store import Split, TokenStore

Answers = Mapping[Pick, Sequence[int]]  # a sample of the store's training splits -> its new response, not empty


class AnsweredSplit(Split):
    """One class's samples.

    Args:
        source: the split that they are of.
        answers: index in it -> the new response.
    """

    def __init__(self, source: Split, answers: Mapping[int, Sequence[int]]) -> None:
        self.specialists = source.specialists
        self.places = {index: place for place, index in enumerate(answers)}
        self.turns = np.arange(len(answers) + 1, dtype=np.int64)
        self.responses, self.response_offsets = _joined(list(answers.values()), source.responses.dtype)
        first = {name: [source[index].prompts_of(name)[0] for index in answers] for name in self.specialists}
        joined = {name: _joined(prompts, source.responses.dtype) for name, prompts in first.items()}
        self.prompts = {name: flat for name, (flat, _) in joined.items()}
        self.prompt_offsets = {name: offsets for name, (_, offsets) in joined.items()}


def answered_splits(store: TokenStore, answers: Answers) -> dict[str, Split]:
    """Class -> its samples among ``answers``, in their order."""
    of_class = {
        name: {index: ids for (other, index), ids in answers.items() if other == name} for name in store.class_names
    }
    return {name: AnsweredSplit(store.split(name, "train"), found) for name, found in of_class.items()}


class Given:
    """A sampler of batches that are known, of samples by their place in :func:`answered_splits`."""

    words = "answers of a model"

    def __init__(self, batches: Sequence[Sequence[Pick]], splits: Mapping[str, Split]) -> None:
        self._batches = [[(name, _place(splits[name], index)) for name, index in batch] for batch in batches]

    def batch(self, step: int) -> list[Pick]:
        """The global batch of a step (from 0), class by class."""
        return self._batches[step]

    def taken(self, steps: int) -> dict[str, float]:
        """Class -> its samples in the first ``steps`` batches."""
        names = [name for batch in self._batches[:steps] for name, _ in batch]
        return {name: float(names.count(name)) for name in dict.fromkeys(names)}


def _place(split: Split, index: int) -> int:
    assert isinstance(split, AnsweredSplit)
    return split.places[index]


def _joined(pieces: Sequence[Sequence[int] | np.ndarray], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    flat = [np.asarray(ids, dtype=dtype) for ids in pieces]
    offsets = np.array([0, *accumulate(len(ids) for ids in flat)], dtype=np.int64)
    return (np.concatenate(flat) if flat else np.empty(0, dtype)), offsets
