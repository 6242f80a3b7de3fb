"""The distributed optimizer's updated weights on their way to all replicas, under the forward that needs them.

Each replica updates a part of every bucket of weights; gathers make them whole. They begin behind the update, all at
once and in the order of the forward. A layer waits for the buckets that hold its weights before its own forward, any
other module for those that are its own; what is used outside of a ``forward`` (heads, gate) is waited for at the end of
the whole module's. So nothing runs on old weights, however a layer uses its children's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator

from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Bucket
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from ultrafuser_mega.runtime.phases import Phases


class WeightGather:
    """See the module. Its hooks go with it.

    Args:
        wrapped: made with ``overlap_param_gather``; Megatron's own hooks are taken off, which wait for what a module
            holds itself when its forward begins, and so leave what is used outside of forwards.
        phases: of this rank; the wait is one.
    """

    def __init__(self, wrapped: DistributedDataParallel, phases: Phases) -> None:
        wrapped.disable_forward_pre_hook(param_sync=False)
        self._buckets: list[Bucket] = wrapped.bucket_groups
        self._phases = phases
        handles = [wrapped.module.register_forward_hook(_hook(self, range(len(self._buckets))))]
        for module, parameters in _units(wrapped.module):
            found = {id(wrapped.param_to_bucket_group[p]) for p in parameters if p in wrapped.param_to_bucket_group}
            if places := [place for place, bucket in enumerate(self._buckets) if id(bucket) in found]:
                handles.append(module.register_forward_pre_hook(_hook(self, places)))
        for handle in handles:
            weakref.finalize(self, handle.remove)

    def start(self) -> None:
        """Begin to gather all weights, which must have been waited for since the last time."""
        for bucket in reversed(self._buckets):  # they are in the order of the backward
            bucket.start_param_sync()

    def wait(self) -> None:
        """Until all weights are whole; no collective where none is on its way."""
        self._wait(range(len(self._buckets)))

    def _wait(self, places: Iterable[int]) -> None:
        buckets = [self._buckets[place] for place in places]
        if waiting := [bucket for bucket in buckets if bucket.param_gather_handle is not None]:
            with self._phases("weights"):
                for bucket in waiting:
                    bucket.finish_param_sync(skip_next_bucket_dispatch=True)


def _hook(gather: WeightGather, places: Iterable[int]) -> Callable[..., None]:
    """Of a module, which outlives what is gathered."""
    weak = weakref.ref(gather)

    def hook(*_: object) -> None:
        if (alive := weak()) is not None:
            alive._wait(places)

    return hook


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """What waits as one, and for which weights."""
    if isinstance(module, TransformerLayer):
        yield module, list(module.parameters())
        return
    named = [child for child in module.children() if isinstance(child, nn.ParameterDict)]  # which have no forward
    yield module, [p for holder in (module, *named) for p in holder.parameters(recurse=False)]
    for child in module.children():
        if child not in named:
            yield from _units(child)
