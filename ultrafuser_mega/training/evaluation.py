"""Held-out evaluation: the fused model and every specialist alone, and what the gate does per sample."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ultrafuser_mega.config import Evaluation
from ultrafuser_mega.data.batches import EvaluationBatches, Shard
from ultrafuser_mega.data.collate import IGNORED, MicroBatch
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.reporting.records import EvaluationResult, SampleGate
from ultrafuser_mega.training.engine import Engine
from ultrafuser_mega.training.totals import ClassTotals


def evaluate(engine: Engine, store: TokenStore, shard: Shard, options: Evaluation) -> EvaluationResult:
    """Evaluate on the first held-out samples of every class; collective over the job.

    Args:
        engine: of this rank.
        store: the run's token store.
        shard: this rank's share of the work; its micro batch size is replaced by the options'.
        options: how many samples, in which microbatches.
    """
    specialists = list(engine.groups.plan.placements)
    models = ["fused", *specialists]
    totals = ClassTotals(store.class_names, [*models, *(f"gate {name}" for name in specialists)], engine.device)
    samples: list[SampleGate] = []
    for class_name in store.class_names:
        batches = EvaluationBatches(store, class_name, shard, options.samples_per_class)
        slot = 0

        def measure(
            hidden: dict[str, Tensor], batch: MicroBatch, class_name: str = class_name, total: int = batches.samples
        ) -> Tensor:
            nonlocal slot
            fusion, exchange = engine.model.fusion, engine.model.exchange
            assert fusion is not None and exchange is not None
            losses, weights = fusion.evaluate(exchange(hidden), batch.targets)
            kept = batch.targets != IGNORED
            values = torch.stack([losses[name].float() for name in models] + list(weights.unbind(1)), dim=1)
            totals.add(batch.row_class[kept], values[kept])
            if engine.groups.is_reporter:
                first = (slot * shard.dp_size + shard.dp_rank) * shard.micro_batch_size
                for place in range(min(shard.micro_batch_size, total - first)):
                    rows = batch.row_sample == place
                    samples.append(
                        SampleGate(
                            class_name, first + place, weights[rows].cpu().numpy(), losses["fused"][rows].cpu().numpy()
                        )
                    )
            slot += 1
            return losses["fused"].new_zeros(())

        engine.forward(batches, measure)
    means = totals.reduce(engine.groups)
    everyone: list[list[SampleGate] | None] = [None] * engine.groups.plan.world_size
    dist.gather_object(samples, everyone if engine.groups.rank == 0 else None)
    collected = [sample for part in everyone if part for sample in part]
    order = {name: i for i, name in enumerate(store.class_names)}
    return EvaluationResult(
        loss={name: {model: row[model] for model in models} for name, row in means.items()},
        gate={name: {other: row[f"gate {other}"] for other in specialists} for name, row in means.items()},
        samples=sorted(collected, key=lambda sample: (order[sample.class_name], sample.index)),
    )
