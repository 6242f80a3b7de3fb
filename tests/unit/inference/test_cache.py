"""Places and pools: sequences never touch each other's, what is kept is found, and a pass sees what it would alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from ultrafuser_mega.inference.cache import Pool, bytes_per_token
from ultrafuser_mega.inference.slots import NOWHERE, Slots

TOTAL = 12
IDS = st.lists(st.integers(0, 1), min_size=1, max_size=6)
ACTIONS = st.lists(st.tuples(st.sampled_from(["open", "read", "keep", "end"]), IDS, st.integers(0, 3)), max_size=40)


@given(actions=ACTIONS)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_places_hold_what_their_sequences_wrote_whatever_comes_and_goes(actions: Any) -> None:
    """Every place is written the tokens up to it; a sequence finds at its places what it read, never something else."""
    slots = Slots(TOTAL)
    written: dict[int, tuple[int, ...]] = {}
    running: list[tuple[list[int], list[int], int]] = []  # ids, places, read
    for action, ids, number in actions:
        if action == "open":
            known = slots.known(ids[:-1])
            assert [written[place] for place in known] == [tuple(ids[: at + 1]) for at in range(len(known))]
            free = slots.free
            if slots.fits(known, len(ids) - len(known)):
                places = slots.take(known, len(ids) - len(known))
                assert slots.free <= free - (len(ids) - len(known))
                running.append((ids, places, len(known)))
        elif running:
            sequence, places, read = running.pop(number % len(running))
            if action == "end":
                slots.give(places)
                continue
            if action == "read":
                for at in range(read, len(sequence)):
                    written[places[at]] = tuple(sequence[: at + 1])
                read = len(sequence)
            else:
                slots.keep(places, sequence[:read])
            running.append((sequence, places, read))
        for sequence, places, read in running:
            assert [written[place] for place in places[:read]] == [tuple(sequence[: at + 1]) for at in range(read)]
            assert NOWHERE not in places and len(set(places)) == len(places)
        assert slots.free == TOTAL - len({place for _, places, _ in running for place in places})
    for _, places, _ in running:
        slots.give(places)
    assert slots.free == TOTAL


def test_what_was_not_used_for_longest_is_forgotten_first_and_ends_before_beginnings() -> None:
    slots = Slots(6)
    for ids in ([1, 2, 3], [4, 5, 6]):
        places = slots.take([], 3)
        slots.keep(places, ids)
        slots.give(places)
    slots.give(slots.take(slots.known([1, 2, 3]), 0))  # used again
    slots.give(slots.take([], 2))
    assert len(slots.known([1, 2, 3])) == 3 and len(slots.known([4, 5, 6])) == 1


@pytest.mark.parametrize("name", ["text", "code"])
def test_rows_of_any_length_read_together_see_what_they_would_alone(model: Any, close: Any, name: str) -> None:
    """Chunks of different sizes, a row that goes back, a beginning that is shared; against a cache of its own."""
    device = torch.device("cpu")
    pool = Pool(model.config.specialist_config(name).num_hidden_layers, 200, device)
    random = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 90, (length,), generator=random).tolist() for length in (30, 7, 19)]
    rows = [pool.open(ids, len(ids) + 8, []) for ids in texts]
    last: dict[int, torch.Tensor] = {}

    def read(numbers: list[int], counts: list[int]) -> None:
        batch = pool.begin([rows[i] for i in numbers], counts)
        hidden = model.last_hidden(name, batch.ids, batch.mask, pool.cache)
        for i, count, states in zip(numbers, counts, hidden, strict=True):
            rows[i].read += count
            last[i] = states[-1]

    with torch.inference_mode():
        read([0, 1, 2], [10, 7, 1])
        read([2, 0], [18, 20])
        rows[1].ids += [5, 6, 7]
        read([1], [3])
        rows[1].cut(8)
        rows[1].ids += [9, 10]
        read([1], [2])
        pool.keep(rows[0])
        texts.append([*texts[0][:20], 4, 4, 4])
        rows.append(pool.open(texts[3], 30, pool.slots.known(texts[3][:-1])))
        assert rows[3].read == 20
        read([3], [3])
        for held, states in zip(rows, [last[i] for i in range(4)], strict=True):
            alone = model.last_hidden(name, torch.tensor([held.ids]), None, DynamicCache())[0, -1]
            torch.testing.assert_close(states, alone, **close)
    for held in rows:
        pool.close(held)
    assert pool.slots.free == pool.slots.total == 200


def test_a_token_takes_the_bytes_of_its_keys_and_values(model: Any) -> None:
    for name in model.names:
        config = model.config.specialist_config(name)
        width = config.num_key_value_heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        assert bytes_per_token(model, name) == 2 * 4 * width * config.num_hidden_layers
