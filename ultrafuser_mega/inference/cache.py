"""Keys and values in buffers that are made once: a step writes its rows and moves nothing.

transformers' dynamic cache copies everything that it holds at every step, its static cache makes attention look at
rows that are not there yet. This one keeps room for the whole answer and shows the filled part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ultrafuser_mega.release.modeling_ultrafuser import FusedCache, UltraFuserForCausalLM


class BufferedLayer(DynamicLayer):
    """One layer's keys and values (b, heads, length, e); grows only when more comes than there was room for.

    A layer with a sliding window keeps all of its past too: transformers' mask hides what lies beyond the window, and
    a conversation can be shortened at any place.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in (b, heads, s, e) each; returns all that is held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if self._buffers is None or stop > self._buffers[0].shape[-2]:
            self._make_room(key_states, value_states, start, stop)
        assert self._buffers is not None
        held = []
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:stop, :] = new
            held.append(buffer[..., :stop, :])
        self.keys, self.values = held
        return self.keys, self.values

    def _make_room(self, key_states: Tensor, value_states: Tensor, start: int, stop: int) -> None:
        room = max(self.room, stop if self._buffers is None else 2 * stop)
        made = []
        for new, held in ((key_states, self.keys), (value_states, self.values)):
            b, heads, _, e = new.shape
            buffer = new.new_empty((b, heads, room, e))
            if held is not None and start:
                buffer[..., :start, :] = held
            made.append(buffer)
        self._buffers = made[0], made[1]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        if self._buffers is None:
            return
        stop = self.get_seq_length()
        keys, values = (buffer.index_select(0, indices.to(buffer.device)) for buffer in self._buffers)
        self._buffers = keys, values
        self.keys, self.values = keys[..., :stop, :], values[..., :stop, :]

    def repeat_row(self, source: BufferedLayer, rows: int) -> None:
        """Hold what ``source`` holds of its only row, ``rows`` times; nothing was held before."""
        stop = source.get_seq_length()
        if not stop or source.keys is None or source.values is None:
            return
        self.lazy_initialization(source.keys, source.values)
        keys, values = (part.expand(rows, -1, -1, -1) for part in (source.keys, source.values))
        self.update(keys, values)

    def join_rows(self, sources: Sequence[tuple[BufferedLayer, int]], length: int) -> None:
        """Hold the rows of several layers, so that all end at ``length``, behind zeros; nothing was held before.

        Args:
            sources: layers, each with how many of its first tokens are left out.
            length: at least the longest of what remains.
        """
        held = [source.keys for source, _ in sources], [source.values for source, _ in sources]
        first = held[0][0]
        assert first is not None
        self.lazy_initialization(first, first)
        rows = sum(len(keys) for keys in held[0] if keys is not None)
        made = []
        for parts in held:
            buffer = first.new_zeros((rows, first.shape[1], max(self.room, length), first.shape[3]))
            place = 0
            for part, (_, cut) in zip(parts, sources, strict=True):
                assert part is not None
                buffer[place : place + len(part), :, length - (part.shape[2] - cut) : length] = part[:, :, cut:]
                place += len(part)
            made.append(buffer)
        self._buffers = made[0], made[1]
        self.keys, self.values = made[0][..., :length, :], made[1][..., :length, :]


def buffered_cache(model: UltraFuserForCausalLM, room: Mapping[str, int]) -> FusedCache:
    """An empty cache for ``model`` with room for ``room[name]`` tokens of each specialist."""
    caches = {}
    for name in model.names:
        layers = model.config.specialist_config(name).num_hidden_layers
        caches[name] = Cache(layers=[BufferedLayer(room[name]) for _ in range(layers)])
    return FusedCache(caches)


def repeated(model: UltraFuserForCausalLM, cache: FusedCache, rows: int, room: Mapping[str, int]) -> FusedCache:
    """A cache of ``rows`` rows, each of which holds what the only row of ``cache`` holds."""
    made = buffered_cache(model, room)
    for new, old in zip(made.layers, cache.layers, strict=True):
        assert isinstance(new, BufferedLayer) and isinstance(old, BufferedLayer)
        new.repeat_row(old, rows)
    return made


def joined(
    model: UltraFuserForCausalLM,
    sources: Sequence[tuple[FusedCache, Mapping[str, int]]],
    lengths: Mapping[str, int],
    room: Mapping[str, int],
) -> FusedCache:
    """The rows of several caches as one; see :meth:`BufferedLayer.join_rows`.

    Args:
        model: that all are of.
        sources: caches, each with how many of a specialist's first tokens are left out.
        lengths: specialist -> where all rows end.
        room: specialist -> tokens that there is to be room for.
    """
    made = buffered_cache(model, room)
    for name, new in made.caches.items():
        for number, layer in enumerate(new.layers):
            own: list[tuple[BufferedLayer, int]] = []
            for cache, cut in sources:
                old = cache.caches[name].layers[number]
                assert isinstance(old, BufferedLayer)
                own.append((old, cut[name]))
            assert isinstance(layer, BufferedLayer)
            layer.join_rows(own, lengths[name])
    return made
