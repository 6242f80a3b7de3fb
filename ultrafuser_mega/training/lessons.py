"""What a student learns in each step of a distillation: the run's data, or its prompts answered by teacher or student.

Which kind a step takes ``distil.data`` says, and of it the next batch that the run's own sampler draws. Prompts for the
teacher are answered before the first step, all of them. The student answers those of its next ``distil.refresh``
on-policy steps with the weights that it has before the first of them. Every rank answers its share; the answers lie in
the run's folder (``answers/``), so that a run that is resumed in between goes on with the same.

Answering is inference's and given to the trainer, which knows nothing of it.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from ultrafuser_mega.checkpoint.checkpoint import is_part_of, write_checkpoint
from ultrafuser_mega.checkpoint.chunks import chunks_to_write
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.config import Distil, FuserConfig, Kind
from ultrafuser_mega.data.answered import Answers, Given, answered_splits
from ultrafuser_mega.data.batches import StepBatch, TrainingBatches
from ultrafuser_mega.data.sampler import Pick
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.files import write_atomically
from ultrafuser_mega.models.fused import FusedStage
from ultrafuser_mega.models.fusion_head import Lesson
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.runtime.groups import RankGroups
from ultrafuser_mega.runtime.phases import ANSWERING, Phases
from ultrafuser_mega.runtime.trainable import Trainable
from ultrafuser_mega.training.assembly import run_sources

ANSWERS = "answers"


class Answering(Protocol):
    """Answers of a model, as token ids."""

    def __call__(
        self,
        model: str,
        prompts: Mapping[int, tuple[Mapping[str, Sequence[int]], int]],
        *,
        temperature: float,
        seed: int,
        device: torch.device,
        go_on: Callable[[], None],
    ) -> dict[int, list[int]]:
        """Row -> answer.

        Args:
            model: where it is, as generate takes it.
            prompts: row -> ids for every specialist, most tokens of the answer; the row decides the draws.
            temperature: 0 for the likeliest tokens.
            seed: of the draws.
            device: of this rank.
            go_on: a sign of life, called whenever some of the work is done.
        """


def begin_with(config: FuserConfig, model: FusedStage) -> None:
    """Let a student of ``model`` learn what it learns of the run's own data."""
    if config.distil is not None and model.fusion is not None:
        model.fusion.lesson = Lesson(config.distil.temperature, config.distil.reverse, config.distil.labels)


def lessons_of(
    plan: RunPlan,
    groups: RankGroups,
    own: TrainingBatches,
    model: FusedStage,
    trainable: Trainable,
    device: torch.device,
    answering: Answering | None,
    phases: Phases,
) -> Lessons | None:
    """See :class:`Lessons`; None where the run is no distillation."""
    if plan.config.distil is None:
        return None
    return Lessons(plan, groups, own, model, trainable, device, answering, phases)


class Lessons:
    """The batches of a distillation's steps; collective over the job where answers are made.

    Args:
        plan: of the run.
        groups: of this rank.
        own: batches of the run's data.
        model: this rank's share, with the student.
        trainable: that trains it.
        device: of this rank.
        answering: None where the run's data alone are taken.
        phases: of this rank.
    """

    def __init__(
        self,
        plan: RunPlan,
        groups: RankGroups,
        own: TrainingBatches,
        model: FusedStage,
        trainable: Trainable,
        device: torch.device,
        answering: Answering | None,
        phases: Phases,
    ) -> None:
        assert plan.config.distil is not None and plan.teacher is not None
        self.distil: Distil = plan.config.distil
        self.teacher, self.plan, self.groups, self.own, self.model = plan.teacher, plan, groups, own, model
        self.trainable, self.device, self._answering, self._phases = trainable, device, answering, phases
        self.folder = plan.config.run_dir / ANSWERS
        self._kinds = self.distil.kinds(plan.config.stage2.steps)
        self._before: list[int] = []  # steps before each that are of its kind
        taken = dict.fromkeys(self._kinds, 0)
        for kind in self._kinds:
            self._before.append(taken[kind])
            taken[kind] += 1
        # Read now: the checkpoint that a run goes on from may not stay.
        self._sources = run_sources(plan) if groups.rank == 0 and "on_policy" in taken else None
        self._answered: dict[tuple[Kind, int], TrainingBatches] = {}

    def waits(self, step: int) -> bool:
        """Whether the answers of this step (from 0) are not there before the steps before it are done."""
        return self._key(step) not in self._answered and self._kinds[step] != "own"

    def begin(self, step: int) -> None:
        """Before a step (from 0): what the student learns in it, and its answers where they are missing."""
        kind = self._kinds[step]
        begin_with(self.plan.config, self.model)
        if kind == "on_policy" and self.model.fusion is not None:
            self.model.fusion.lesson = Lesson(self.distil.temperature, reverse=1.0, labels=0.0)
        if self.waits(step):
            key = self._key(step)
            self._answered = {old: batches for old, batches in self._answered.items() if old[0] != kind}
            self._answered[key] = self._made(kind, key[1], step)

    def step(self, step: int) -> StepBatch:
        """The work of a step (from 0)."""
        at = self._before[step]
        if self._kinds[step] == "own":
            return self.own.step(at)
        return self._answered[self._key(step)].step(at - self._first(*self._key(step)))

    def batch(self, step: int) -> list[Pick]:
        """The samples whose prompts a step takes."""
        return self.own.sampler.batch(self._before[step])

    def _key(self, step: int) -> tuple[Kind, int]:
        """Of the answers that a step takes: their kind, and how many times that kind was answered before."""
        kind = self._kinds[step]
        return kind, self._before[step] // self.distil.refresh if kind == "on_policy" else 0

    def _first(self, kind: Kind, window: int) -> int:
        return window * self.distil.refresh if kind == "on_policy" else 0

    def _made(self, kind: Kind, window: int, step: int) -> TrainingBatches:
        begin, every = self._first(kind, window), self._kinds.count(kind)
        end = min(every, begin + self.distil.refresh) if kind == "on_policy" else every
        batches = [self.own.sampler.batch(at) for at in range(begin, end)]
        wanted = list(dict.fromkeys(pick for batch in batches for pick in batch))
        path = self.folder / f"{kind}-{window:05d}.jsonl"
        # A run that goes on in the midst of the student's steps has answers by the weights that it had before them.
        known = path.is_file() and (kind == "prompts" or self._before[step] > begin)
        answers: dict[Pick, Sequence[int]] = {**read_answers(path, self.own.store.vocab_size)} if known else {}
        # All of them, or those of the steps that a run has been given since.
        if missing := [pick for pick in wanted if pick not in answers]:
            with self._phases(ANSWERING, whole=True):
                answers |= self._ask(kind, window, step, missing)
            if self.groups.rank == 0:
                _write_answers(path, answers)
        splits = answered_splits(self.own.store, {pick: answers[pick] for pick in wanted})
        return self.own.over(splits, Given(batches, splits))

    def _ask(self, kind: Kind, window: int, step: int, wanted: list[Pick]) -> Answers:
        if self._answering is None:
            raise InputError(f"distil.data.{kind}: needs answers, which this program does not give; use ultrafuser")
        student = self.distil.student
        model = f"{self._written(step)}@{student}" if kind == "on_policy" else str(self.teacher)
        names = [student] if kind == "on_policy" else self.plan.config.fused
        rank, ranks = self.groups.rank, self.groups.plan.world_size
        prompts = {row: self._prompt(wanted[row], names) for row in range(rank, len(wanted), ranks)}
        seed = zlib.crc32(f"{self.plan.config.seed}/{kind}/{window}".encode()) >> 1
        own = self._answering(
            model,
            prompts,
            temperature=self.distil.sampling_temperature,
            seed=seed,
            device=self.device,
            go_on=self._phases.go_on,
        )
        everyone: list[dict[int, list[int]]] = [{}] * ranks
        dist.all_gather_object(everyone, own, group=self.groups.world)
        rows = {row: ids for part in everyone for row, ids in part.items()}
        return {pick: rows[row] for row, pick in enumerate(wanted)}

    def _prompt(self, pick: Pick, names: Sequence[str]) -> tuple[dict[str, list[int]], int]:
        """Ids for each of ``names``, and room for the answer in the longest sequence of all specialists."""
        name, index = pick
        first = {other: ids[0] for other, ids in self.own.splits[name][index].prompts.items()}
        room = self.own.store.max_length - max(len(ids) for ids in first.values())
        return {other: first[other].tolist() for other in names}, min(self.distil.max_new_tokens, room)

    def _written(self, step: int) -> Path:
        """The student as it is, in a checkpoint of it alone, and of the gate, whose type is the weights'."""
        folder = self.folder / "student"
        if self.groups.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        dist.barrier(group=self.groups.world)
        self.trainable.settle()  # the last update's weights may be on their way to this replica
        held = chunks_to_write(self.model, None, self.groups)
        chunks = [c for c in held if is_part_of(c.key, self.distil.student) or c.key.startswith("gate.")]
        progress, identity = Progress(2, step), self.plan.identity
        write_checkpoint(folder, folder, progress, chunks, self.groups.world, identity, self._sources)
        dist.barrier(group=self.groups.world)
        return folder


def _write_answers(path: Path, answers: Answers) -> None:
    lines = [json.dumps({"class": name, "index": at, "ids": ids}) for (name, at), ids in answers.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n".join(lines) + "\n")


def read_answers(path: Path, vocab_size: int) -> dict[Pick, list[int]]:
    """What a run has kept; raises InputError where the file is damaged, or holds what is no token of the vocabulary."""
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        answers = {(str(r["class"]), int(r["index"])): [int(token) for token in r["ids"]] for r in records}
        for pick, ids in answers.items():
            if not ids or not 0 <= min(ids) <= max(ids) < vocab_size:
                raise ValueError(f"{pick[0]} {pick[1]}: not one or more tokens of 0 to {vocab_size - 1}")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error!r}); remove it: --resume has its prompts answered anew") from None
    return answers
