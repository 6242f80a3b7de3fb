"""Samples for a job whose data are not at hand: all of one length, their tokens zeros."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ultrafuser_mega.data.store import OFFSET_DTYPE, Split


class UniformSplit(Split):
    """``samples`` samples of ``length`` tokens for every specialist, the last ``response`` of them to be predicted."""

    def __init__(self, specialists: Sequence[str], samples: int, length: int, response: int) -> None:
        self.specialists = tuple(specialists)
        every = np.arange(samples + 1, dtype=OFFSET_DTYPE)
        self.turns, self.response_offsets = every, every * response
        self.responses = np.zeros(samples * response, np.uint16)
        prompts, offsets = np.zeros(samples * (length - response), np.uint16), every * (length - response)
        self.prompts = dict.fromkeys(self.specialists, prompts)
        self.prompt_offsets = dict.fromkeys(self.specialists, offsets)


class UniformStore:
    """A token store of such samples, as much of it as batches are made from."""

    def __init__(
        self, classes: Sequence[str], specialists: Sequence[str], *, samples: int, length: int, response: int
    ) -> None:
        self.class_names, self.specialists = tuple(classes), tuple(specialists)
        self.folder = "uniform samples"
        self._split = UniformSplit(specialists, samples, length, response)

    def entry_samples(self, class_name: str, entries: int) -> list[int]:
        """As many of each entry as can be."""
        whole = len(self.split(class_name, "train"))
        return [whole * (at + 1) // entries - whole * at // entries or 1 for at in range(entries)]

    def split(self, class_name: str, split: str) -> Split:
        """The same for all."""
        return self._split
