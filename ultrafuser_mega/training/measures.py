"""What every rank measured of a step beside its losses, and what that says of the step.

A rank's numbers travel in the sum that the step makes anyway. The wait for that sum is over too late for it, and on a
GPU nobody waits to know how long a phase took: so a step's record holds the phases of the step before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ultrafuser_mega.data.batches import StepBatch
from ultrafuser_mega.planning.microbatch import GlobalBatch
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.planning.step_time import useful_flops
from ultrafuser_mega.reporting.records import StepRecord
from ultrafuser_mega.runtime.device import held_memory, peak_memory, to_device
from ultrafuser_mega.runtime.phases import ANSWERING, OTHER, Phases
from ultrafuser_mega.runtime.trainable import Rates
from ultrafuser_mega.training.stragglers import Stragglers
from ultrafuser_mega.training.totals import Totals, gate_column

IDLE = "idle"
#: Phases in which a rank does nothing but wait for others; what is sent there is small, or waited for by who sends.
WAITS = ("pipeline transfer", "gradient norm", "end of step")


@dataclass(frozen=True)
class Measured:
    """A step's numbers beside its losses: the largest of all ranks; ``phases`` of the step before.

    wanted   what the ranks were asked to do (``Stopping``)
    phases   phase -> "mean" over the ranks that were in it, and "worst", the largest; seconds
    """

    grad_norm: float
    data_seconds: float
    memory_bytes: int
    peak_memory_bytes: int
    wanted: float
    phases: Mapping[str, Mapping[str, float]]


class Measures:
    """Of one rank.

    Args:
        plan: of the run.
        device: where the rank computes.
        phases: of the rank.
        peak_flops: of each GPU; None: not known.
    """

    def __init__(self, plan: RunPlan, device: torch.device, phases: Phases, peak_flops: float | None) -> None:
        self._plan, self._device, self._phases, self._peak_flops = plan, device, phases, peak_flops
        forward = [f"forward of {name}" for name in plan.config.specialists]
        self._computes = ["data", *forward, "loss", "backward", "optimizer"]
        replicas = plan.layout.data_groups()
        self._meetings = {"exchange": plan.layout.fusion_groups(), "gradients": replicas, "weights": replicas}
        self._names = [*self._computes, *self._meetings, *WAITS, ANSWERING, "save", "evaluation", OTHER]
        self._stragglers = Stragglers(plan)
        self._tokens: dict[str, int] = {}  # specialist -> its tokens in the step before
        self.straggler: str | None = None

    def own(self, norm: Tensor, data_seconds: float, wanted: float) -> Tensor:
        """(k,) float64: this rank's numbers, for all ranks.

        Args:
            norm: () of the gradients.
            data_seconds: waited for the step's microbatches.
            wanted: of the rank's ``Stopping``.
        """
        seconds = self._phases.of_last_step()
        memory = [float(held_memory(self._device)), float(peak_memory(self._device))]
        host = [data_seconds, *memory, wanted, *(seconds.get(name, 0.0) for name in self._names)]
        return torch.cat([norm.double()[None], to_device(torch.tensor(host, dtype=torch.float64), self._device)])

    def read(self, ranks: np.ndarray, batch: StepBatch) -> Measured:
        """What all ranks said of the step of ``batch``, (ranks, k).

        ``straggler`` is a line about one that was not known before, or None.
        """
        phases = dict(zip(self._names, ranks[:, 5:].T.copy(), strict=True))
        computing = np.sum([phases[name] for name in self._computes], axis=0)
        known = self._tokens and computing.all()  # both, but for the first step
        self.straggler = self._stragglers.step(computing, self._tokens) if known else None
        self._tokens = {name: int(lengths.sum()) for name, lengths in batch.lengths.items()}
        grad_norm, data_seconds, memory, peak, wanted = ranks[:, :5].max(axis=0).tolist()
        return Measured(grad_norm, data_seconds, int(memory), int(peak), wanted, self._summary(phases))

    def record(
        self,
        measured: Measured,
        totals: Totals,
        batch: StepBatch,
        *,
        stage: int,
        step: int,
        loss: float,
        rates: Rates,
        seconds: float,
        skipped: bool,
    ) -> StepRecord:
        """What is kept of a step; ``step`` counts through both stages."""
        means = totals.means
        return StepRecord(
            stage=stage,
            step=step,
            loss=loss,
            class_loss={name: row["loss"] for name, row in means.items()},
            lr=rates.lr,
            gate_lr=rates.gate_lr,
            part_lr=rates.parts,
            grad_norm=measured.grad_norm,
            tokens=batch.response_tokens,
            tokens_per_s=batch.response_tokens / seconds,
            gate={
                name: {other: row[gate_column(other)] for other in self._plan.config.fused}
                for name, row in means.items()
            },
            seconds=seconds,
            processed_tokens=batch.processed_tokens,
            padding=batch.packing.padding,
            imbalance=batch.packing.imbalance,
            fill=batch.packing.fill,
            data_seconds=measured.data_seconds,
            memory_bytes=measured.memory_bytes,
            peak_memory_bytes=measured.peak_memory_bytes,
            mfu=self._utilisation(batch, stage, seconds),
            save_seconds=self._phases.host_seconds["save"],
            phases=measured.phases,
            skipped=skipped,
        )

    def _utilisation(self, batch: StepBatch, stage: int, seconds: float) -> float:
        if self._peak_flops is None:
            return math.nan
        useful = useful_flops(self._plan, GlobalBatch(batch.lengths, batch.responses), stage)
        return useful / (self._plan.layout.world_size * self._peak_flops * seconds)

    def _summary(self, phases: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
        """Of (ranks,) seconds per phase.

        The ranks of a group meet in an exchange, and in a sum of gradients. Who comes last finds all others there: its
        seconds, the fewest, are the transfer's, and what others spent beyond them was idle.
        """
        idle = np.sum([phases.pop(name) for name in WAITS], axis=0)
        for name, groups in self._meetings.items():
            for group in groups:
                least = phases[name][group].min()
                idle[group] += phases[name][group] - least
                phases[name][group] = least
        last = {name: phases.pop(name) for name in (ANSWERING, "save", "evaluation", OTHER)}
        every = phases | {IDLE: idle} | last
        return {
            name.replace(" ", "_"): {"mean": float(seconds[seconds > 0].mean()), "worst": float(seconds.max())}
            for name, seconds in every.items()
            if (seconds > 0).any()
        }
