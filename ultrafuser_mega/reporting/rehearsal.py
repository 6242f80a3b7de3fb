"""What a dry run saw of a job's ranks: records, and a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
_SHOWN = 0.005  # of the unit: less is 0.00


@dataclass(frozen=True)
class Collective:
    """Calls of one collective in one group, and the bytes of each call's largest tensor added up."""

    group: str
    name: str
    calls: int
    bytes: int


@dataclass(frozen=True)
class Microbatch:
    """Specialists of the rank -> lengths of the sequences that were packed; rows of the loss."""

    lengths: dict[str, list[int]]
    rows: int


@dataclass(frozen=True)
class Predicted:
    """What arithmetic says of a part: bytes at the peak, and FLOPs of all that ran."""

    peak: float
    flops: float


@dataclass(frozen=True)
class Part:
    """One part of the run on one rank.

    name             "evaluation", "stage 1", "stage 2", "checkpoint"
    microbatches     of the stages, those that ran, one by one
    peak             kind -> bytes, when most was allocated: weights, gradients, optimizer (moments, float32 weights),
                     buffers (scratch space that layers keep), activations (of forward and backward), update
                     (temporaries of the optimizer's step), checkpoint (what is gathered for it)
    flops            "products", "attention" -> FLOPs
    operations       operation -> how often it was dispatched
    waits            where the host waited for the device, and why -> how often
    host             bytes of the host's memory that were pinned, at the most
    """

    name: str
    microbatches: list[Microbatch]
    peak: dict[str, int]
    flops: dict[str, int]
    operations: dict[str, int]
    collectives: list[Collective]
    waits: dict[str, int]
    host: int = 0

    @property
    def peak_bytes(self) -> int:
        """All kinds together."""
        return sum(self.peak.values())


@dataclass(frozen=True)
class Rehearsal:
    """What one rank did, part by part."""

    rank: int
    parts: list[Part]

    def as_json(self) -> dict[str, Any]:
        """For one process to hand to another."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Rehearsal:
        """What :meth:`as_json` made."""
        parts = [
            Part(
                **{
                    **part,
                    "collectives": [Collective(**each) for each in part["collectives"]],
                    "microbatches": [Microbatch(**each) for each in part["microbatches"]],
                }
            )
            for part in value["parts"]
        ]
        return cls(value["rank"], parts)


def rehearsal_table(
    title: str, roles: Sequence[tuple[str, Rehearsal]], predicted: Mapping[tuple[int, str], Predicted]
) -> Table:
    """One row for each part of each rank: memory by kind when most was held, FLOPs and traffic per microbatch.

    Args:
        title: of the table.
        roles: what each rank is, and what it did.
        predicted: (rank, part) -> what the formula says, where it says something.
    """
    kinds = [
        kind
        for kind in ("weights", "gradients", "optimizer", "buffers", "activations", "update", "checkpoint")
        if any(part.peak.get(kind) for _, rehearsal in roles for part in rehearsal.parts)
    ]
    largest = max((part.peak_bytes for _, rehearsal in roles for part in rehearsal.parts), default=0)
    unit, size = next(((name, size) for name, size in _UNITS.items() if largest >= size), ("KiB", _UNITS["KiB"]))

    def held(count: float) -> str:
        return f"{count / size:.2f}" if count else ""

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("rank", "part"):
        table.add_column(column, no_wrap=True)
    on_host = ["host"] if any(part.host >= _SHOWN * size for _, rehearsal in roles for part in rehearsal.parts) else []
    for column in (*kinds, "peak", "formula", *on_host, "TFLOP", "formula", "traffic", "operations", "waits"):
        table.add_column(column, justify="right", no_wrap=True)
    for role, rehearsal in roles:
        for index, part in enumerate(rehearsal.parts):
            share = max(len(part.microbatches), 1)
            formula = predicted.get((rehearsal.rank, part.name))
            table.add_row(
                f"{rehearsal.rank} {role}" if index == 0 else "",
                part.name,
                *(held(part.peak.get(kind, 0)) for kind in kinds),
                f"[bold]{held(part.peak_bytes)}[/]",
                held(formula.peak) if formula else "",
                *(held(part.host) for _ in on_host),
                f"{sum(part.flops.values()) / share / 1e12:.3g}" if part.flops else "",
                f"{formula.flops / share / 1e12:.3g}" if formula and formula.flops else "",
                f"{sum(c.bytes for c in part.collectives) / share / 1e9:.3g} GB" if part.collectives else "",
                f"{sum(part.operations.values()) // share:,}",
                f"{sum(part.waits.values())}" if part.waits and part.microbatches else "",
                end_section=index == len(rehearsal.parts) - 1,
            )
    table.caption = (
        f"memory in {unit} at its largest; FLOPs, bytes of collectives and dispatched operations per microbatch of a"
        " stage; what the allocator, CUDA and NCCL take for themselves (3 to 5 GiB on a GPU) comes on top"
        f"{'; host: what is pinned of its memory' if on_host else ''}"
    )
    return table


def waits_of(rehearsals: Sequence[Rehearsal]) -> list[str]:
    """Every place where a step's host waits for the device, one line each."""
    found: dict[str, int] = {}
    for rehearsal in rehearsals:
        for part in rehearsal.parts:
            if part.microbatches:
                for where, count in part.waits.items():
                    found[where] = max(found.get(where, 0), count)
    return [f"the host waits {count} time(s) a step: {where}" for where, count in found.items()]
