"""Held-out evaluation: the fused model, every specialist alone, yardsticks, and what the gate does per sample."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ultrafuser_mega.config import Evaluation
from ultrafuser_mega.data.batches import EvaluationBatches, Shard
from ultrafuser_mega.data.collate import MicroBatch
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.reporting.records import (
    FUSED,
    ORACLE_PER_CLASS,
    ORACLE_PER_SAMPLE,
    ORACLE_PER_TOKEN,
    TEACHER,
    UNIFORM_LOGITS,
    UNIFORM_PROBABILITIES,
    EvaluationResult,
    SampleGate,
)
from ultrafuser_mega.training.engine import Engine
from ultrafuser_mega.training.totals import ClassTotals, gate_column
from ultrafuser_mega.training.yardsticks import mixed_and_chosen

_LOSSES = (UNIFORM_PROBABILITIES, ORACLE_PER_SAMPLE, ORACLE_PER_TOKEN)  # of mixed_and_chosen


def evaluate(
    engine: Engine, store: TokenStore, shard: Shard, options: Evaluation, student: str | None = None
) -> EvaluationResult:
    """Evaluate on the first held-out samples of every class; collective over the job.

    Args:
        engine: of this rank.
        store: the run's token store.
        shard: this rank's share of the work.
        options: how many samples.
        student: of the specialists, the one that the others teach: what is called fused is the student then, as it is
            trained, and the fused model is called teacher.
    """
    specialists = [name for name in engine.groups.plan.placements if name != student]
    models = [FUSED, *specialists] if student is None else [FUSED, *specialists, TEACHER, student]
    columns = [FUSED, UNIFORM_LOGITS, *models[1:], *_LOSSES, *map(gate_column, specialists)]
    totals = ClassTotals(store.class_names, columns, engine.device)
    batches = EvaluationBatches(store, shard, options.samples_per_class)
    counts: list[int] = []
    gates: list[Tensor] = []  # per microbatch (N, n + 1): the gate's weights and the fused model's loss of every row

    def measure(hidden: dict[str, Tensor], batch: MicroBatch) -> Tensor:
        fusion, exchange = engine.model.fusion, engine.model.exchange
        assert fusion is not None and exchange is not None
        losses, weights = fusion.evaluate(exchange(hidden), batch.targets)
        without_gate = mixed_and_chosen(losses[2 : 2 + len(specialists)], batch.row_counts)
        totals.add(batch.row_class, torch.cat([losses.t().double(), without_gate, weights.double()], dim=1))
        counts.extend(batch.row_counts)
        gates.append(torch.cat([weights, losses[:1].t()], dim=1))
        return losses.new_zeros(())

    engine.forward(batches, measure)
    means = totals.reduce(engine.groups).means
    samples = []
    if engine.groups.is_reporter and gates:
        rows = torch.cat(gates).cpu().split(counts)
        places = [place for microbatch in batches.places for place in microbatch]
        samples = [
            SampleGate(name, index, part[:, :-1].numpy(), part[:, -1].numpy())
            for (name, index), part in zip(places, rows, strict=True)
        ]
    everyone: list[list[SampleGate] | None] = [None] * engine.groups.plan.world_size
    dist.gather_object(samples, everyone if engine.groups.rank == 0 else None)
    collected = [sample for part in everyone if part for sample in part]
    order = {name: i for i, name in enumerate(store.class_names)}
    return EvaluationResult(
        loss={name: {model: row[model] for model in models} for name, row in means.items()},
        gate={name: {other: row[gate_column(other)] for other in specialists} for name, row in means.items()},
        yardsticks={
            name: {
                UNIFORM_LOGITS: row[UNIFORM_LOGITS],
                UNIFORM_PROBABILITIES: row[UNIFORM_PROBABILITIES],
                ORACLE_PER_CLASS: min(row[model] for model in specialists),
                ORACLE_PER_SAMPLE: row[ORACLE_PER_SAMPLE],
                ORACLE_PER_TOKEN: row[ORACLE_PER_TOKEN],
            }
            for name, row in means.items()
        },
        samples=sorted(collected, key=lambda sample: (order[sample.class_name], sample.index)),
    )
