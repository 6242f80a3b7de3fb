"""The buffered cache holds what transformers' dynamic one holds, whatever is done to it, and does not move it."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from ultrafuser_mega.inference.cache import BufferedLayer, buffered_cache

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 5)),
        st.tuples(st.just("crop"), st.integers(0, 4)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 2), min_size=3, max_size=3)),
    ),
    max_size=12,
)


@given(room=st.integers(1, 12), actions=ACTIONS)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_it_equals_the_dynamic_cache(room: Any, actions: Any) -> None:
    ours, theirs = BufferedLayer(room), DynamicLayer()
    generator = torch.Generator().manual_seed(0)
    for action, value in [("update", 3), *actions]:
        if action == "update":
            new = [torch.randn(3, 2, value, 4, generator=generator) for _ in range(2)]
            found, expected = ours.update(*new), theirs.update(*new)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        elif action == "crop":
            for layer in (ours, theirs):
                layer.crop(-min(value, layer.get_seq_length()))
        else:
            for layer in (ours, theirs):
                layer.batch_select_indices(torch.tensor(value))
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(2) == theirs.get_mask_sizes(2)


def test_within_its_room_nothing_is_moved() -> None:
    layer = BufferedLayer(room=8)
    places = {layer.update(*torch.randn(2, 1, 2, 1, 4))[0].data_ptr() for _ in range(8)}
    assert len(places) == 1


def test_every_specialist_has_its_own_layers_and_room(model: Any) -> None:
    cache = buffered_cache(model, dict.fromkeys(model.names, 16))
    ids = torch.arange(3, 8)[None]
    for name in model.names:
        model.last_hidden(name, ids, None, cache.caches[name])
    assert {name: own.get_seq_length() for name, own in cache.caches.items()} == dict.fromkeys(model.names, 5)
    assert len(cache.layers) == sum(model.config.specialist_config(name).num_hidden_layers for name in model.names)
