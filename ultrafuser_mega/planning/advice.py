"""What ``ultrafuser plan --gpus`` tells: the best layouts of so many GPUs, and what follows from them, in words."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ultrafuser_mega.planning.hardware import GIB, Cluster
from ultrafuser_mega.planning.host_memory import host_memory
from ultrafuser_mega.planning.layouts import Candidate, fewer_gpus, layout_entry, ranked, worthwhile
from ultrafuser_mega.planning.microbatch import Workload, workload_of
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.reporting.layout_table import LayoutRow
from ultrafuser_mega.runtime.layout import LayoutPlan

_SHOWN = 8
_MISSED = 3  # of the rows shown, at most so many that do not fit as configured, where others do


@dataclass(frozen=True)
class Advice:
    """Rows of the table, layouts that it leaves out, and the lines below it."""

    rows: list[LayoutRow]
    more: int
    lines: list[str]


def advise(plan: RunPlan, cluster: Cluster, gpus: int) -> Advice:
    """Rank the layouts of ``gpus`` GPUs for the run's last stage.

    Raises:
        InputError: there is a token store that cannot be read.
    """
    stage = max(plan.config.stages, default=2)
    options = plan.config.stages.get(stage, plan.config.stage2)
    work = workload_of(plan.config, options.samples_per_class)
    found = ranked(plan, work, cluster, gpus, stage=stage)
    fitting = [one for one in found if one.fits]
    shown = [*fitting[: _SHOWN - _MISSED], *[one for one in found if not one.fits][:_MISSED]]
    shown += fitting[_SHOWN - _MISSED :][: _SHOWN - len(shown)]
    best_colocated = next((one for one in found if one.plan.layout.kind == "colocated"), None)
    if best_colocated is not None and best_colocated not in shown:  # the plainest to run
        shown[-1] = best_colocated
    shown.sort(key=found.index)
    lines = [*_batch_lines(work, stage), *_verdict(plan, found[0], work, cluster, gpus, stage)]
    lines.append(
        "read: config.json of the specialists alone; not checked: weights, tokenizers, data, which "
        "ultrafuser plan without --gpus does"
    )
    return Advice([row_of(one) for one in shown], len(found) - len(shown), lines)


def row_of(candidate: Candidate) -> LayoutRow:
    """A candidate as the table shows it."""
    step = candidate.step
    note = candidate.short_of
    if candidate.remedy is not None:
        note = f"{note}; shown with {candidate.remedy}, which fits"
    return LayoutRow(
        layout=short(candidate.plan.layout),
        seconds=step.seconds,
        mfu=step.mfu,
        idle=step.idle,
        parts=step.parts,
        peak=step.memory.peak,
        phase=step.memory.phase,
        kinds=step.memory.kinds,
        flops=step.flops,
        nbytes=step.nbytes,
        note=note,
    )


def short(layout: LayoutPlan) -> str:
    """``colocated tp 8 pp 2 dp 4``, ``disjoint 4 + 4 + 8x2 dp 2``: tp, or tp x pp, of each specialist."""
    replicas = f" dp {layout.dp}" if layout.dp > 1 else ""
    places = list(layout.placements.values())
    if layout.kind == "colocated":
        return f"colocated tp {places[0].tp}" + (f" pp {places[0].pp}" if places[0].pp > 1 else "") + replicas
    return "disjoint " + " + ".join(f"{p.tp}x{p.pp}" if p.pp > 1 else str(p.tp) for p in places) + replicas


def _batch_lines(work: Workload, stage: int) -> list[str]:
    tokens = sum(work.tokens.values()) / len(work.tokens)
    return [f"stage {stage}: {work.samples} samples, {tokens:,.0f} tokens a specialist in a step ({work.source})"]


def _verdict(plan: RunPlan, best: Candidate, work: Workload, cluster: Cluster, gpus: int, stage: int) -> list[str]:
    room = f"{cluster.room / GIB:.1f} GiB, {cluster.assumed.reserved / GIB:.0f} of its GPU left to CUDA and NCCL"
    if not best.usable:
        return [f"nothing fits a rank's {room}; take more GPUs, or larger ones"]
    lines = [f"a rank may use {room}"]
    fewer = fewer_gpus(plan, work, cluster, gpus, stage=stage)
    enough = worthwhile(gpus, best.step.seconds, fewer)
    if enough < gpus:
        times = dict(fewer)
        share = best.step.seconds / times[enough]
        lines.append(
            f"{gpus} GPUs are too many for this batch: {enough} are predicted to take {times[enough]:.2f} s a step, "
            f"{share:.0%} of the speed; more samples_per_class would feed them"
        )
    if (host := host_memory(best.plan)) is not None:
        lines.append(host.in_words(min(cluster.gpus_per_node, gpus)))
    settings = f"   with {best.remedy}" if best.remedy else ""
    lines += [f"layouts:{settings}", f"  - {_flow(layout_entry(best.plan.layout))}"]
    return lines


def _flow(value: Any) -> str:
    """YAML in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)
