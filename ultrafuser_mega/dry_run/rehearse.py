"""What one rank of a planned job would do and hold: the program itself, run on fake tensors.

The model, Megatron's schedules, the exchange, the loss, the optimizer and evaluation are those of a real run, stage
after stage; weights are not read, nothing is written, and the other ranks do not exist. Of every stage two steps run
and the second is reported, since the first makes the optimizer's moments.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch

from ultrafuser_mega.checkpoint.chunks import chunks_to_write
from ultrafuser_mega.checkpoint.saver import copies_for
from ultrafuser_mega.data.batches import StepBatch, TrainingBatches
from ultrafuser_mega.data.collate import MicroBatch
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.dry_run.fake_job import fake_tensors, joined_fake_job
from ultrafuser_mega.dry_run.meter import Meter
from ultrafuser_mega.dry_run.samples import UniformStore
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.planning.roles import distinct_ranks, role_of
from ultrafuser_mega.reporting.rehearsal import Microbatch, Part, Rehearsal
from ultrafuser_mega.runtime.groups import RankGroups, make_groups
from ultrafuser_mega.runtime.trainable import Rates, Trainable
from ultrafuser_mega.training.assembly import make_shard
from ultrafuser_mega.training.evaluation import evaluate
from ultrafuser_mega.training.trainer import Trainer


def rank_classes(plan: RunPlan) -> dict[int, str]:
    """One rank of every kind, and what it is: a stage of a specialist, or, colocated, of all of them."""
    found = {}
    for rank in distinct_ranks(plan):
        role = role_of(plan, rank)
        found[rank] = ", ".join(role.names) + (f" {role.stage + 1}/{role.pp}" if role.pp > 1 else "")
    return found


def rehearse(
    plan: RunPlan,
    rank: int,
    device: torch.device,
    store: TokenStore | None = None,
    microbatches: int | None = None,
) -> Rehearsal:
    """Be one rank of ``plan`` on fake tensors of ``device``.

    Args:
        plan: of the run.
        rank: whom to play.
        device: "cpu", or "cuda" with :func:`~ultrafuser_mega.dry_run.fake_cuda.load_fake_cuda` before.
        store: the run's data; None: samples of data.max_length, all of whose tokens but the first are responses.
        microbatches: of a step, at most; None: what fills the pipeline, and one.
    """
    with joined_fake_job(plan.layout.world_size, rank), _only_new_garbage():
        groups = make_groups(plan.layout)
        meter = Meter(device.type, group_names(groups))
        shard = make_shard(plan, groups, pad_id=0)
        with fake_tensors(meter, device):
            trainer = Trainer(plan, groups, store or _uniform_store(plan), device, shard)
            return Rehearsal(rank, list(run_parts(trainer, meter, microbatches)))


@contextmanager
def _only_new_garbage() -> Iterator[None]:
    """The meter has garbage collected before all that it measures: of what is made meanwhile, not of all imports."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def run_parts(trainer: Trainer, meter: Meter, microbatches: int | None = None) -> Iterator[Part]:
    """Evaluation, two steps of every stage, and what a checkpoint gathers, measured; on real tensors as on fake ones.

    Args:
        trainer: built under ``meter``.
        meter: open.
        microbatches: as :func:`rehearse`.
    """
    yield _evaluation(trainer, meter)
    for number in trainer.plan.config.stages:
        yield from _stage(trainer, meter, number, microbatches)


def _uniform_store(plan: RunPlan) -> TokenStore:
    config = plan.config
    store = UniformStore(
        list(config.data.classes),
        list(config.specialists),
        samples=max(config.stage1.samples_per_class, config.stage2.samples_per_class, plan.layout.dp),
        length=config.data.max_length,
        response=config.data.max_length - 1,
    )
    return cast(TokenStore, store)


class _FirstMicrobatches:
    """Batches cut to one microbatch in the first step and to ``limit`` later: more would only do the same again."""

    def __init__(self, batches: TrainingBatches, limit: int) -> None:
        self.batches, self.limit = batches, limit

    def step(self, step: int) -> StepBatch:
        batch = self.batches.step(step)
        return replace(batch, microbatches=batch.microbatches[: self.limit if step else 1])


@dataclass(frozen=True)
class _WatchedTrainable(Trainable):
    """A trainable whose update's temporaries are told apart from activations."""

    meter: Meter

    def clip_gradients(self) -> torch.Tensor:
        with self.meter.making("update"):
            return super().clip_gradients()

    def update(self, *, skip: bool) -> Rates:
        with self.meter.making("update"):
            return super().update(skip=skip)


def _stage(trainer: Trainer, meter: Meter, number: int, microbatches: int | None) -> Iterator[Part]:
    plan = trainer.plan
    placement = plan.layout.placements[trainer.groups.local_specialists[0]]
    batches = _FirstMicrobatches(trainer.batches(number), microbatches or placement.pp + 1)
    with meter.making("gradients"):
        made = trainer.make_trainable(number)
        trainable = _WatchedTrainable(**vars(made), meter=meter)
    _tell_apart(meter, trainer, trainable)
    for step in range(2):
        with _measured(meter):
            trainer.step(number, trainable, batches, step, 0.0)
        if step == 0:
            meter.rename("update", "optimizer")
            meter.rename("activations", "buffers")
    yield _part(f"stage {number}", meter, trainer, batches.step(1).microbatches)
    if number == list(plan.config.stages)[-1]:
        with _measured(meter), meter.making("checkpoint"):
            copies_for(chunks_to_write(trainer.model, trainable, trainer.groups))
        yield _part("checkpoint", meter, trainer)


def _tell_apart(meter: Meter, trainer: Trainer, trainable: Trainable) -> None:
    """Making a trainable, Megatron moves weights into a buffer and copies them in float32: neither is a gradient."""
    parameters = list(trainer.model.parameters())
    weights = sum(parameter.untyped_storage().nbytes() for parameter in _distinct(parameters))
    meter.shift("gradients", "weights", weights - meter.memory.now["weights"])
    updated = [parameter for group in trainable.optimizer.param_groups for parameter in group["params"]]
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    copies = [parameter for parameter in updated if parameter.untyped_storage()._cdata not in own]
    held = sum(copy.untyped_storage().nbytes() for copy in _distinct(copies))
    if trainable.host is not None and trainable.device.type == "cpu":
        held += trainable.host.nbytes
    meter.shift("gradients", "optimizer", held)


def _distinct(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One tensor for each storage."""
    return list({tensor.untyped_storage()._cdata: tensor for tensor in tensors}.values())


def _evaluation(trainer: Trainer, meter: Meter) -> Part:
    options = trainer.plan.config.evaluation.model_copy(update={"samples_per_class": trainer.plan.layout.dp})
    with _measured(meter):
        evaluate(trainer.engine, trainer.store, trainer.shard, options)
    part = _part("evaluation", meter, trainer)
    meter.rename("activations", "buffers")
    return part


@contextmanager
def _measured(meter: Meter) -> Iterator[None]:
    meter.clear()
    with meter.making("activations"):
        yield


def _part(name: str, meter: Meter, trainer: Trainer, microbatches: Sequence[MicroBatch] = ()) -> Part:
    return Part(
        name=name,
        microbatches=[
            Microbatch({name: list(tokens.lengths) for name, tokens in batch.tokens.items()}, len(batch.targets))
            for batch in microbatches
        ],
        peak={kind: size for kind, size in meter.memory.at_peak.items() if size},
        flops=dict(meter.flops),
        operations=dict(meter.operations),
        collectives=meter.collectives,
        waits=dict(meter.waits),
        host=meter.pinned.peak,
    )


def group_names(groups: RankGroups) -> dict[str, str]:
    """Name of each of a rank's process groups, as PyTorch knows it -> what it is called here."""
    megatron = groups.megatron
    named = {"tp": megatron.tp, "pp": megatron.pp, "dp": groups.data, "fusion": groups.fusion}
    named |= {"replica": groups.replica, "world": groups.world}
    return {group.group_name: name for name, group in reversed(named.items()) if group is not None}
