"""How long a step takes a cluster, predicted: the slowest rank's microbatch, times their number, and what comes once.

    microbatch = max(device, host)
    device     = products + attention + elementwise + weights' gradients + tp, exchange and pipeline traffic that no
                 product hides
    products   = FLOPs at the share of the peak that is assumed, or the time to read the weights
    attention  = its whole squares at the same share: its kernels skip half of each, and reach half of what others do
    elementwise = bytes through memory, or the shortest kernel as often as there are kernels
    host       = dispatched operations and collectives of the rank's one thread
    step       = (microbatches + pp - 1) microbatch + replicas' gradients and weights + optimizer + host

All ranks of a replica meet in every microbatch (colocated in turn, disjoint at the exchange), so they wait for the
slowest; the busiest replica is waited for at the end. See ``hardware.Assumptions`` for how far to believe it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ultrafuser_mega.config import HEADS
from ultrafuser_mega.planning.cost import TODAY, Program, RankCost, Traffic, rank_cost
from ultrafuser_mega.planning.hardware import Cluster
from ultrafuser_mega.planning.memory import RankMemory, rank_memory
from ultrafuser_mega.planning.microbatch import GlobalBatch, Share, Workload
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.planning.roles import distinct_ranks, layer_matrices, role_of
from ultrafuser_mega.planning.trained import Trains

#: Dispatched operations of a layer's forward and backward, and those that are kernels of their own beside products:
#: of Megatron's layer, counted on a CPU, and of today's, counted by the dry run (tools/benchmarks/measure_dry_run.py).
_OPERATIONS, _FUSED_OPERATIONS = 183, 70
_KERNELS, _FUSED_KERNELS = 80, 20
_OTHER_OPERATIONS = 460  # of a microbatch beside its layers
_STEP_OPERATIONS = 6  # per parameter, in clipping and updating
_UNDER_BACKWARD, _UNDER_FORWARD = 0.6, 0.3  # of a microbatch: what gradients and weights can travel under

TP, EXCHANGE, PP, DP = "tp traffic", "exchange", "pp traffic", "dp traffic"
HOST = "state from the host"


@dataclass(frozen=True)
class StepEstimate:
    """A predicted step.

    Attributes:
        seconds: of the whole step.
        parts: seconds of the slowest rank, by what it does; they sum to ``seconds``.
        idle: share of all ranks' time in microbatches that is spent waiting for others.
        mfu: FLOPs that the model needs (masked scores and recomputation do not count) in parts of the peak.
        flops: of the slowest rank's products, in the step.
        nbytes: of that rank's collectives by group, in the step.
        microbatches: of the busiest replica.
        memory: of the rank that holds most.
    """

    seconds: float
    parts: Mapping[str, float]
    idle: float
    mfu: float
    flops: float
    nbytes: Mapping[str, float]
    microbatches: int
    memory: RankMemory


def estimate(
    plan: RunPlan,
    work: Workload,
    cluster: Cluster,
    *,
    stage: int = 2,
    program: Program = TODAY,
) -> StepEstimate:
    """The mean of the steps of ``work`` under ``plan``'s layout."""
    each = [_one_step(plan, step, work, cluster, stage, program) for step in work.steps]
    seconds = float(np.mean([one.seconds for one in each]))
    useful = float(np.mean([useful_flops(plan, step, stage) for step in work.steps]))
    return StepEstimate(
        seconds=seconds,
        parts={name: float(np.mean([one.parts[name] for one in each])) for name in each[0].parts},
        idle=float(np.mean([one.idle for one in each])),
        mfu=useful / (plan.layout.world_size * cluster.gpu.flops * seconds),
        flops=float(np.mean([one.flops for one in each])),
        nbytes={group: float(np.mean([one.nbytes[group] for one in each])) for group in each[0].nbytes},
        microbatches=max(one.microbatches for one in each),
        memory=most_memory(plan, work, stage=stage),
    )


def most_memory(plan: RunPlan, work: Workload, *, stage: int = 2) -> RankMemory:
    """Memory of the rank that holds most, for the fullest microbatch of ``work``."""
    fullest, count = work.fullest(plan.layout.dp), work.most_microbatches(plan.layout.dp)
    held = [rank_memory(plan, rank, fullest, stage=stage, microbatches=count) for rank in distinct_ranks(plan)]
    return max(held, key=lambda memory: memory.peak)


def useful_flops(plan: RunPlan, batch: GlobalBatch, stage: int = 2) -> float:
    """Products that a step needs whatever the layout.

    6 per token and weight, 6 h e sum s^2 of a layer's attention (half of every square), heads and gate on response
    tokens alone; of what is frozen a third, of what trains by adapters two thirds.
    """
    total, rows, tokens, squares = 0.0, float(batch.responses.sum()), batch.tokens, batch.squares
    trains = Trains.of(plan.config, stage)
    for name, arch in plan.architectures.items():
        passes = 6 if trains.whole(name) else 4 if trains.backward(name) else 2
        total += passes * tokens[name] * arch.layers * layer_matrices(arch, 1)
        total += (6 if trains.backward(name) else 2) * squares[name] * arch.layers * arch.heads * arch.head_dim
        ends = 2 if trains.gate_alone else 2 + 2 * trains.whole(HEADS) + 2 * trains.states
        total += ends * rows * arch.hidden_size * (plan.vocab_size + plan.gate_units)
    return total


@dataclass(frozen=True)
class _Step:
    seconds: float
    parts: dict[str, float]
    idle: float
    flops: float
    nbytes: dict[str, float]
    microbatches: int


def _one_step(
    plan: RunPlan, batch: GlobalBatch, work: Workload, cluster: Cluster, stage: int, program: Program
) -> _Step:
    share, imbalance = batch.busiest(plan.layout.dp, work.microbatch_tokens)
    ranks = distinct_ranks(plan)
    costs = [rank_cost(plan, rank, share.mean, stage=stage, program=program) for rank in ranks]
    parts = [_microbatch_parts(cost, cluster, program) for cost in costs]
    times = [sum(part.values()) for part in parts]
    slowest = max(range(len(ranks)), key=times.__getitem__)
    weights = [role_of(plan, rank).tp for rank in ranks]
    pp = max(placement.pp for placement in plan.layout.placements.values())
    rounds = share.count + pp - 1
    busy = float(np.average(times, weights=weights)) * share.count / imbalance
    world = plan.layout.world_size
    once = [
        _once(cost, cluster, program, times[at]) | _from_host(cost, cluster, world) for at, cost in enumerate(costs)
    ]
    last = max(range(len(ranks)), key=lambda at: sum(once[at].values()))
    total = {name: seconds * share.count for name, seconds in parts[slowest].items()}
    total["pipeline fill"] = (pp - 1) * times[slowest]
    total |= once[last]
    return _Step(
        seconds=sum(total.values()),
        parts=total,
        idle=1 - busy / (rounds * times[slowest]),
        flops=sum(costs[slowest].products.values()) * share.count,
        nbytes=_group_bytes(costs[slowest], share),
        microbatches=share.count,
    )


def _microbatch_parts(cost: RankCost, cluster: Cluster, program: Program) -> dict[str, float]:
    assumed, gpu = cluster.assumed, cluster.gpu
    products = sum(flops for kind, flops in cost.products.items() if kind != "attention")
    moved = gpu.bandwidth * assumed.hbm
    kernels = cost.layers * (_FUSED_KERNELS if program.fused_nodes else _KERNELS) * assumed.kernel
    parts = {
        "products": max(products / (gpu.flops * assumed.gemm), cost.read / moved),
        "attention": cost.products["attention"] / (gpu.flops * assumed.gemm),
        "elementwise": max(cost.moved["elementwise"] / moved, kernels),
        "weights' gradients": cost.moved["gradients"] / moved,
    }
    for name, group in ((TP, "tp"), (EXCHANGE, "fusion"), (PP, "pp")):
        parts[name] = sum(
            _shown(one, cluster, program) for one in cost.traffic if one.group == group and not one.per_step
        )
    operations = cost.layers * (_FUSED_OPERATIONS if program.fused_nodes else _OPERATIONS) + _OTHER_OPERATIONS
    calls = sum(one.calls for one in cost.traffic if not one.per_step)
    host = operations * assumed.operation + calls * assumed.collective
    parts["host"] = max(0.0, host - sum(parts.values()))
    return parts


def _once(cost: RankCost, cluster: Cluster, program: Program, microbatch: float) -> dict[str, float]:
    """What comes once a step."""
    replicas = [_seconds(one, cluster) for one in cost.traffic if one.group == "dp"]
    hidden = (
        _UNDER_BACKWARD * microbatch if program.gradient_overlap else 0.0,
        _UNDER_FORWARD * microbatch if program.weight_overlap else 0.0,
    )
    replicas = [max(0.0, shown - under) for shown, under in zip(replicas, hidden, strict=False)]
    norms = sum(_seconds(one, cluster) for one in cost.traffic if one.per_step and one.group != "dp")
    assumed = cluster.assumed
    return {
        DP: sum(replicas),
        "optimizer": cost.moved_per_step / (cluster.gpu.bandwidth * assumed.hbm) + norms,
        "step's host": assumed.step + _STEP_OPERATIONS * cost.tensors * assumed.operation,
    }


def _from_host(cost: RankCost, cluster: Cluster, world: int) -> dict[str, float]:
    """Copies of the optimizer's state, both directions at once, at the link's pace or at that of the node's memory."""
    if not cost.from_host:
        return {}
    assumed, ranks = cluster.assumed, min(cluster.gpus_per_node, world)
    link = cost.from_host / (cluster.gpu.host_bandwidth * assumed.pcie)
    return {HOST: max(link, 2 * ranks * cost.from_host / assumed.host_memory)}


def _shown(traffic: Traffic, cluster: Cluster, program: Program) -> float:
    """Seconds that are waited for a collective; where products come in parts, what these take longer as well."""
    assumed, whole = cluster.assumed, _seconds(traffic, cluster)
    products = cluster.gpu.flops * assumed.gemm
    if traffic.under:
        return max(whole - traffic.under / products, (1 - assumed.hidden) * whole)
    if not (traffic.beside and program.tensor_overlap):
        return whole
    half = (whole + traffic.calls * assumed.latency) / 2
    product = assumed.parts * traffic.beside / products / 2
    second = max(half - product, (1 - assumed.hidden) * half)
    return min(whole, half + second + (1 - 1 / assumed.parts) * 2 * product)


def _seconds(traffic: Traffic, cluster: Cluster) -> float:
    ranks = len(traffic.ranks)
    nodes = len({rank // cluster.gpus_per_node for rank in traffic.ranks})
    travelled = traffic.nbytes if traffic.group == "pp" else traffic.nbytes * traffic.passes * (ranks - 1) / ranks
    return traffic.calls * cluster.assumed.latency + travelled / cluster.bus(ranks, nodes)


def _group_bytes(cost: RankCost, share: Share) -> dict[str, float]:
    return {
        group: share.count * cost.group_bytes(group, per_step=False) + cost.group_bytes(group, per_step=True)
        for group in ("tp", "pp", "dp", "fusion")
    }
