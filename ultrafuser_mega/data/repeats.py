"""Conversations that stand in the training data more than once, and held-out ones that are trained on.

Exact copies only: the same texts in the same order. 20 bytes are kept of every conversation, 8 of them a hash; among
ten million conversations two different ones share a hash with a probability of 3 in a million.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator

import numpy as np

from ultrafuser_mega.data.conversation import Conversation

Place = tuple[int, int, int]  # which file, line, row


class Repeats:
    """Hashes and places of all conversations that went into the store, in the order in which they did."""

    def __init__(self) -> None:
        self._hashes = {split: array("Q") for split in ("train", "heldout")}
        self._places = {split: array("I") for split in ("train", "heldout")}

    def add(self, split: str, place: Place, conversation: Conversation) -> None:
        """Keep in mind a conversation of ``split`` ("train" or "heldout")."""
        parts = [conversation.system, *conversation.turns, sorted(conversation.untrained)]
        digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
        self._hashes[split].append(int.from_bytes(digest, "little"))
        self._places[split].extend(place)

    def found(self, split: str) -> Iterator[Place]:
        """Of "train": each that repeats an earlier one. Of "heldout": each that is trained on as well."""
        train = np.frombuffer(self._hashes["train"], np.uint64)
        if split == "train":
            repeats = np.ones(len(train), bool)
            repeats[np.unique(train, return_index=True)[1]] = False
        else:
            repeats = np.isin(np.frombuffer(self._hashes["heldout"], np.uint64), train)
        places = np.frombuffer(self._places[split], np.uint32).reshape(-1, 3)
        yield from map(tuple, places[repeats].tolist())
