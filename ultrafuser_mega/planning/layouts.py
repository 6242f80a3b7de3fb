"""Which layouts so many GPUs can take, which of them fit, which is fastest, and what would make the others fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.hf_folder import Architecture, check_parallel_sizes
from ultrafuser_mega.planning.hardware import GIB, Cluster
from ultrafuser_mega.planning.memory import most_layers
from ultrafuser_mega.planning.microbatch import Workload
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.planning.roles import layer_matrices
from ultrafuser_mega.planning.step_time import StepEstimate, estimate, most_memory
from ultrafuser_mega.planning.trained import Trains
from ultrafuser_mega.runtime.layout import LayoutPlan, plan_colocated, plan_disjoint

_MOST_STAGES = 8  # of a specialist in a disjoint layout
_UNEVEN = 2.0  # a layout whose busiest ranks have more than so many times the mean work is none to consider
_WORTH = 1.5  # twice the GPUs should be so many times as fast at the least
_TOKEN_STEP = 256


@dataclass(frozen=True)
class Candidate:
    """A layout with what is predicted of it.

    Attributes:
        plan: of the run under it, ``remedy`` applied where there is one.
        step: predicted.
        fits: whether every rank's peak fits as configured.
        remedy: the one setting that makes it fit, as ``key=value``; None if it fits or nothing alone does.
        short_of: what it lacks, in words; None if it fits.
        needed: memory as configured; ``step.memory`` where there is no remedy.
    """

    plan: RunPlan
    step: StepEstimate
    fits: bool
    remedy: str | None
    short_of: str | None
    needed: float

    @property
    def usable(self) -> bool:
        """As configured or with its remedy."""
        return self.fits or self.remedy is not None


def ranked(plan: RunPlan, work: Workload, cluster: Cluster, gpus: int, *, stage: int = 2) -> list[Candidate]:
    """All sensible layouts of exactly ``gpus`` ranks: those that fit, those that one setting makes fit, the others.

    Of the first two the fastest first, of the others those that miss by least.

    Args:
        plan: of the run; its layout does not count.
        work: the steps to predict.
        cluster: where it would run.
        gpus: ranks.
        stage: of training.
    """
    found = [_judged(replace(plan, layout=layout), work, cluster, stage) for layout in layouts_for(plan, gpus, cluster)]
    return sorted(found, key=_order)


def _order(one: Candidate) -> tuple[bool, bool, float]:
    return not one.fits, not one.usable, one.step.seconds if one.usable else one.needed


def layouts_for(plan: RunPlan, gpus: int, cluster: Cluster) -> list[LayoutPlan]:
    """Colocated and disjoint layouts of exactly ``gpus`` ranks whose tensor groups stay within a node."""
    found = list(_colocated(plan, gpus, cluster.gpus_per_node))
    if len(plan.architectures) > 1:
        found += _disjoint(plan, gpus, cluster.gpus_per_node)
    return [layout for layout in found if _within_nodes(layout, cluster.gpus_per_node)]


def fewer_gpus(
    plan: RunPlan, work: Workload, cluster: Cluster, gpus: int, *, stage: int = 2
) -> list[tuple[int, float]]:
    """(GPUs, seconds of a step) of the best usable layout of half the GPUs, a quarter, ... while there is one."""
    found, number = [], gpus // 2
    while number >= 1:
        best = ranked(plan, work, cluster, number, stage=stage)[:1]
        if not best or not best[0].usable:
            break
        found.append((number, best[0].step.seconds))
        number //= 2
    return found


def worthwhile(gpus: int, seconds: float, fewer: Sequence[tuple[int, float]]) -> int:
    """The most GPUs, among those looked at, that are half again as fast as half of them at the least."""
    counts = [(gpus, seconds), *fewer]
    for (number, fast), (_, slow) in pairwise(counts):
        if slow / fast >= _WORTH:
            return number
    return counts[-1][0]


def layout_entry(layout: LayoutPlan) -> dict[str, Any]:
    """The layout as an entry of the configuration's ``layouts``."""
    first = next(iter(layout.placements.values()))
    replicas = {"dp": layout.dp} if layout.dp > 1 else {}
    if layout.kind == "colocated":
        return {"kind": "colocated", "tp": first.tp, "pp": first.pp, **replicas}
    sizes = {name: {"tp": p.tp, "pp": p.pp} if p.pp > 1 else {"tp": p.tp} for name, p in layout.placements.items()}
    return {"kind": "disjoint", "specialists": sizes, **replicas}


def _judged(plan: RunPlan, work: Workload, cluster: Cluster, stage: int) -> Candidate:
    memory = most_memory(plan, work, stage=stage)
    if memory.peak <= cluster.room:
        step = estimate(plan, work, cluster, stage=stage)
        return Candidate(plan, step, fits=True, remedy=None, short_of=None, needed=memory.peak)
    short = f"{memory.phase} needs {memory.peak / GIB:.1f} GiB"
    for remedy, changed, less in _remedies(plan, work, stage):
        if most_memory(changed, less, stage=stage).peak <= cluster.room:
            step = estimate(changed, less, cluster, stage=stage)
            return Candidate(changed, step, fits=False, remedy=remedy, short_of=short, needed=memory.peak)
    step = estimate(plan, work, cluster, stage=stage)
    if memory.static > cluster.room:
        short += f", {memory.static / GIB:.1f} without activations: more tp, pp or dp"
    return Candidate(plan, step, fits=False, remedy=None, short_of=short, needed=memory.peak)


def _remedies(plan: RunPlan, work: Workload, stage: int) -> Iterator[tuple[str, RunPlan, Workload]]:
    """Settings that take less memory, one at a time, what costs least time first; last what takes the host's."""
    parallel = plan.config.parallel
    if not parallel.sequence_parallel and any(placement.tp > 1 for placement in plan.layout.placements.values()):
        yield "parallel.sequence_parallel=true", _parallel(plan, sequence_parallel=True), work
    if Trains.of(plan.config, stage).states:
        if not parallel.distributed_optimizer and plan.layout.dp > 1:
            yield "parallel.distributed_optimizer=true", _parallel(plan, distributed_optimizer=True), work
        layers = most_layers(plan)
        for count in sorted({*range(1, layers, max(1, layers // 8)), layers}):
            wanted = "all" if count == layers else count
            yield f"parallel.recompute_layers={wanted}", _parallel(plan, recompute_layers=wanted), work
    least = max(int(max(step.lengths[name].max() for name in step.lengths)) for step in work.steps)
    tokens = work.microbatch_tokens // 2 // _TOKEN_STEP * _TOKEN_STEP
    while tokens >= max(least, plan.config.data.max_length):
        changed = replace(plan, config=plan.config.model_copy(update={"microbatch_tokens": tokens}))
        yield f"microbatch_tokens={tokens}", changed, replace(work, microbatch_tokens=tokens)
        tokens = tokens // 2 // _TOKEN_STEP * _TOKEN_STEP
    optimizer = plan.config.optimizer
    if optimizer.state != "host":
        config = plan.config.model_copy(update={"optimizer": optimizer.model_copy(update={"state": "host"})})
        yield "optimizer.state=host", replace(plan, config=config), work


def _parallel(plan: RunPlan, **update: Any) -> RunPlan:
    parallel = plan.config.parallel.model_copy(update=update)
    return replace(plan, config=plan.config.model_copy(update={"parallel": parallel}))


def _colocated(plan: RunPlan, gpus: int, per_node: int) -> Iterator[LayoutPlan]:
    archs = plan.architectures
    most = min(arch.layers for arch in archs.values())
    for tp in _tensor_sizes(archs, per_node):
        for pp in range(1, most + 1):
            if gpus % (tp * pp) == 0:
                yield plan_colocated(list(archs), tp, pp, gpus // (tp * pp))


def _disjoint(plan: RunPlan, gpus: int, per_node: int) -> Iterator[LayoutPlan]:
    archs = plan.architectures
    names = list(archs)
    work = {name: arch.layers * layer_matrices(arch, 1) for name, arch in archs.items()}
    total = sum(work.values())
    for replica in (size for size in range(len(names), gpus + 1) if gpus % size == 0):
        options = {}
        for name, arch in archs.items():
            fair = work[name] / total * replica
            options[name] = [
                (tp, pp)
                for tp in _tensor_sizes({name: arch}, per_node)
                for pp in range(1, min(arch.layers, _MOST_STAGES) + 1)
                if fair / _UNEVEN <= tp * pp
            ]
        for sizes in _filling(names, options, archs, replica):
            # What the busiest rank has in parts of the mean.
            if max(work[name] / (tp * pp) for name, (tp, pp) in sizes.items()) * replica / total <= _UNEVEN:
                yield plan_disjoint({name: (tp, pp, None) for name, (tp, pp) in sizes.items()}, gpus // replica)


def _filling(
    names: Sequence[str],
    options: Mapping[str, Sequence[tuple[int, int]]],
    archs: Mapping[str, Architecture],
    ranks: int,
    before: Mapping[str, tuple[int, int]] | None = None,
) -> Iterator[dict[str, tuple[int, int]]]:
    """Sizes for ``names`` that take ``ranks`` together. Equal specialists get them in ascending order only."""
    chosen = dict(before or {})
    if not names:
        if ranks == 0:
            yield chosen
        return
    name, *others = names
    least = max(
        (size for other, size in chosen.items() if _alike(archs[other], archs[name])),
        default=(0, 0),
        key=lambda size: (size[0] * size[1], size),
    )
    for tp, pp in options[name]:
        if tp * pp <= ranks - len(others) and (tp * pp, (tp, pp)) >= (least[0] * least[1], least):
            yield from _filling(others, options, archs, ranks - tp * pp, {**chosen, name: (tp, pp)})


def _alike(one: Architecture, other: Architecture) -> bool:
    return replace(one, vocab_rows=0, rope_theta=0.0) == replace(other, vocab_rows=0, rope_theta=0.0)


def _tensor_sizes(archs: Mapping[str, Architecture], per_node: int) -> list[int]:
    return [tp for tp in range(1, per_node + 1) if all(_shardable(name, arch, tp) for name, arch in archs.items())]


def _shardable(name: str, arch: Architecture, tp: int) -> bool:
    try:
        check_parallel_sizes(name, arch, tp, 1)
    except InputError:
        return False
    return True


def _within_nodes(layout: LayoutPlan, per_node: int) -> bool:
    return all(
        group[0] // per_node == group[-1] // per_node
        for name in layout.placements
        for group in layout.tensor_groups(name)
    )
