"""An evaluation from its settings to samples.jsonl: models one after the other, items shared out among the ranks.

    OUT/settings.json     what makes two evaluations comparable; compared when this one goes on
    OUT/samples.jsonl     every answer, one to a line, as it comes

Whatever an earlier start has answered is not asked again. More models, benchmarks or items can be added to a folder; a
setting that would make its answers incomparable is refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ultrafuser_mega.checkpoint.unfinished import alone
from ultrafuser_mega.errors import InputError, writing
from ultrafuser_mega.evaluation.answering import answer_items
from ultrafuser_mega.evaluation.benchmark import Benchmark, Item, Sample
from ultrafuser_mega.evaluation.contestants import Contestant
from ultrafuser_mega.evaluation.results import sha256
from ultrafuser_mega.evaluation.samples import (
    SAMPLES,
    Key,
    append_sample,
    gather_samples,
    key_of,
    rank_file,
    read_samples,
)
from ultrafuser_mega.files import write_atomically

SETTINGS = "settings.json"
_UNTIL_DONE = timedelta(days=365)


@dataclass(frozen=True)
class Task:
    """A benchmark, which of its items are asked, and how many tokens a reply may have."""

    benchmark: Benchmark
    items: Sequence[Item]
    max_new_tokens: int


@dataclass(frozen=True)
class Share:
    """Which of the items this process answers.

    Attributes:
        rank, ranks: of the job.
        store: what its ranks share (torch.distributed); None for one that is alone.
    """

    rank: int = 0
    ranks: int = 1
    store: Any = None

    def wait_for_first(self) -> None:
        """Until rank 0 has said that there is something to go on with."""
        if self.store is not None and self.rank:
            self.store.wait(["evaluation/ready"], _UNTIL_DONE)

    def say_ready(self) -> None:
        """The others may begin."""
        if self.store is not None:
            self.store.set("evaluation/ready", "")

    def wait_for_all(self) -> None:
        """Until every rank has answered its share; only rank 0 needs to know."""
        if self.store is None:
            return
        self.store.set(f"evaluation/done/{self.rank}", "")
        if self.rank == 0:
            self.store.wait([f"evaluation/done/{rank}" for rank in range(self.ranks)], _UNTIL_DONE)


def settings_of(
    contestants: Sequence[Contestant], tasks: Sequence[Task], data: Path, seed: int, sandbox: str, dtype: str | None
) -> dict[str, Any]:
    """What settings.json holds."""
    return {
        "seed": seed,
        "dtype": dtype or "as stored",
        "decoding": "greedy",
        "code sandbox": sandbox,
        "models": {one.name: {"address": one.address, "identity": one.identity} for one in contestants},
        "benchmarks": {
            task.benchmark.name: {
                "file": task.benchmark.source,
                "sha256": sha256(data / task.benchmark.source),
                "max_new_tokens": task.max_new_tokens,
                "items": len(task.items),
            }
            for task in tasks
        },
    }


def run_evaluation(
    contestants: Sequence[Contestant],
    tasks: Sequence[Task],
    settings: dict[str, Any],
    out: Path,
    share: Share,
    console: Console,
) -> list[Sample]:
    """Answer what is missing; on rank 0 all samples of the folder are returned, on others none.

    Raises:
        InputError: another process evaluates into ``out``, or it was made with other settings.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if share.rank == 0:
            stack.enter_context(alone(out))
            merge_settings(out / SETTINGS, settings)
            gather_samples(out)
            share.say_ready()
        share.wait_for_first()
        known = {key_of(sample) for sample in _read(out / SAMPLES)}
        file = stack.enter_context(rank_file(out, share.rank, share.ranks).open("a", encoding="utf-8"))
        progress = stack.enter_context(_progress(console, share.rank))
        for contestant in contestants:
            missing = _missing(contestant, tasks, known, share)
            if not missing:
                continue
            with contestant.opened() as answering:
                for task, items in missing:
                    bar = progress.add_task(f"{contestant.name}: {task.benchmark.title}", total=len(items), speed="")
                    began, tokens = time.perf_counter(), 0
                    for sample in answer_items(contestant.name, answering, task.benchmark, items, task.max_new_tokens):
                        append_sample(file, sample)
                        tokens += sample.tokens
                        progress.update(bar, advance=1, speed=_speed(tokens, began) if tokens else "")
                    if not console.is_terminal and share.rank == 0:
                        seconds = time.perf_counter() - began
                        console.print(
                            f"{contestant.name}: {task.benchmark.title}: {len(items):,} items in {seconds:.0f} s"
                            + (f", {_speed(tokens, began)}" if tokens else ""),
                            highlight=False,
                        )
        file.close()
        share.wait_for_all()
        return gather_samples(out) if share.rank == 0 else []


def merge_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write ``settings``, those of earlier models and benchmarks kept.

    Raises:
        InputError: the folder's answers were given under others; names the first that differs.
    """
    if path.is_file():
        before = _settings_in(path)
        for key in ("seed", "dtype", "decoding", "code sandbox"):
            _same(path, key, before.get(key), settings[key])
        for name, entry in settings["models"].items():
            if (known := before["models"].get(name)) is not None:
                _same(path, f"models.{name}", known.get("identity"), entry["identity"])
        for name, entry in settings["benchmarks"].items():
            if (known := before["benchmarks"].get(name)) is not None:
                for field in ("sha256", "max_new_tokens"):
                    _same(path, f"benchmarks.{name}.{field}", known.get(field), entry[field])
        for part in ("models", "benchmarks"):
            settings = settings | {part: before[part] | settings[part]}
    write_atomically(path, json.dumps(settings, indent=1) + "\n")


def _settings_in(path: Path) -> dict[str, Any]:
    try:
        before: dict[str, Any] = json.loads(path.read_text())
        for part in ("models", "benchmarks"):
            for name, entry in before[part].items():
                if not isinstance(entry, dict):
                    raise TypeError(f"{part}.{name} is {entry!r}")
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not valid JSON; choose another --out") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: no settings of an evaluation ({error}); choose another --out") from None
    return before


def _same(path: Path, key: str, before: Any, now: Any) -> None:
    if before != now:
        raise InputError(
            f"{path}: {key} was {before!r} for the answers that are there, now it is {now!r}; choose another --out"
        )


def _missing(
    contestant: Contestant, tasks: Sequence[Task], known: set[Key], share: Share
) -> list[tuple[Task, list[Item]]]:
    """This rank's share of what has no answer yet."""
    missing = []
    for task in tasks:
        items = [item for item in task.items if (contestant.name, task.benchmark.name, item.id) not in known]
        if own := items[share.rank :: share.ranks]:
            missing.append((task, own))
    return missing


def _read(path: Path) -> list[Sample]:
    return read_samples(path) if path.is_file() else []


def _progress(console: Console, rank: int) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}")
    shown = console.is_terminal and rank == 0
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not shown)


def _speed(tokens: int, began: float) -> str:
    return f"{tokens / max(time.perf_counter() - began, 1e-9):,.0f} tokens/s"
