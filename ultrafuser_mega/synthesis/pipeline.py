"""A run from the configuration to the files: the steps of every class, one after the other; classes side by side."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from ultrafuser_mega.checkpoint.unfinished import alone
from ultrafuser_mega.config.load import dump_config
from ultrafuser_mega.errors import writing
from ultrafuser_mega.files import write_atomically
from ultrafuser_mega.synthesis.client import Asker, InterruptedRunError
from ultrafuser_mega.synthesis.config import SUB_TOPICS, TOPICS, SynthesisConfig
from ultrafuser_mega.synthesis.duplicates import Duplicates, NearlySameWords, SameWords
from ultrafuser_mega.synthesis.instructions import Gathering
from ultrafuser_mega.synthesis.ledger import Ledger, Lost
from ultrafuser_mega.synthesis.left_out import LeftOut
from ultrafuser_mega.synthesis.output import Made, write_output
from ultrafuser_mega.synthesis.progress import Progress
from ultrafuser_mega.synthesis.responses import respond
from ultrafuser_mega.synthesis.review import Review
from ultrafuser_mega.synthesis.templates import Templates
from ultrafuser_mega.synthesis.topics import Topic, first_level, next_level, read_topics


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        files: with rows, where it is finished.
        to_review: lists to look through first, where it waits for that.
        progress: what was asked.
        lost: what may have been paid for in vain, in all runs.
    """

    progress: Progress
    files: list[Path] = field(default_factory=list)
    to_review: list[Path] = field(default_factory=list)
    lost: Lost = field(default_factory=lambda: Lost(0, 0, 0.0))


def synthesize(config: SynthesisConfig, folder: Path, *, review: bool, console: Console) -> Outcome:
    """Make the data of ``config`` in ``folder``, or go on with them.

    Args:
        review: stop behind every list, for a person to look it through.
        console: for progress and notes.

    Raises:
        InputError: the configuration, an endpoint or the disk; all that was answered is kept.
        LimitReachedError: the limit is reached.
        InterruptedRunError: by SIGINT or SIGTERM.
    """
    # What can be wrong on this side is told before anything is paid for.
    tools = {of: _tools(config, of) for of in config.classes}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        with writing(folder):
            write_atomically(folder / "config.yaml", dump_config(config))
        ledger = Ledger(folder)
        try:
            if ledger.found.requests:
                found = ledger.found
                console.print(
                    f"{found.requests} requests were under way when the run before ended; they may have been paid for, "
                    f"with at most {found.tokens:,} tokens, {config.currency}{found.cost:.4f}",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
            return asyncio.run(_run(config, folder, ledger, tools, Review(folder, review), console))
        finally:
            ledger.close()


@dataclass(frozen=True)
class _Tools:
    """What a class is made with: its prompts, the instructions that are there, and topics made by hand."""

    templates: Templates
    duplicates: Duplicates
    topics: list[Topic]


def _tools(config: SynthesisConfig, of: str) -> _Tools:
    data = config.classes[of]
    near = config.near_duplicates
    return _Tools(
        Templates(data.prompts),
        SameWords() if near is None else NearlySameWords(near),
        [] if data.topics_file is None else read_topics(data.topics_file),
    )


async def _run(
    config: SynthesisConfig,
    folder: Path,
    ledger: Ledger,
    tools: dict[str, _Tools],
    review: Review,
    console: Console,
) -> Outcome:
    priced = any(model.price is not None for model in config.models.values())
    progress, left_out = Progress(console, config.currency if priced else None), LeftOut()
    asker = Asker(config, ledger, progress)
    progress.limits = lambda: _limits(asker)
    outcome = Outcome(progress)
    with _ending_on_signals(asker, console), progress.shown():
        try:
            for of in config.classes:
                for step in config.used(of):
                    asker.client(config.step(of, step).model)
            made = await asyncio.gather(
                *(_class(asker, of, tools[of], review, left_out) for of in config.classes), return_exceptions=True
            )
        finally:
            await asker.close()
    outcome.lost = ledger.lost()
    whole: dict[str, Made] = {}
    for of, one in zip(config.classes, made, strict=True):
        if isinstance(one, BaseException):
            raise asker.stop or one
        if isinstance(one, Path):
            outcome.to_review.append(one)
        else:
            whole[of] = one
    if not outcome.to_review:
        with writing(folder):
            outcome.files = write_output(folder, config, ledger, whole, left_out)
    return outcome


async def _class(asker: Asker, of: str, tools: _Tools, review: Review, left_out: LeftOut) -> Made | Path:
    """All of one class, or the list that is to be looked through first."""
    templates = tools.templates
    topics = tools.topics or await _topics(asker, of, templates, review, left_out)
    if isinstance(topics, Path):
        return topics
    if not topics:
        return Made([], [])
    gathering = Gathering(asker, of, topics, templates, tools.duplicates, left_out)
    pool = review.instructions(of, await gathering.all(), left_out)
    if isinstance(pool, Path):
        return pool
    return Made(topics, await respond(asker, of, pool, templates, left_out))


async def _topics(asker: Asker, of: str, templates: Templates, review: Review, left_out: LeftOut) -> list[Topic] | Path:
    data = asker.config.classes[of]
    assert data.topics is not None
    topics = review.topics(of, TOPICS, await first_level(asker, of, data.domain, data.topics[0], templates, left_out))
    for level, number in enumerate(data.topics[1:], start=2):
        if isinstance(topics, Path):
            return topics
        await next_level(asker, of, data.domain, topics, number, templates, left_out)
        topics = review.topics(of, SUB_TOPICS if level == 2 else f"{SUB_TOPICS}_{level}", topics)
    return topics


def _limits(asker: Asker) -> str:
    shown = [f"{gate.running}/{int(gate.limit)} {name}" for name, gate in asker.gates.items() if gate.running]
    return f"under way: {', '.join(shown)}" if shown else ""


class _ending_on_signals:  # noqa: N801  reads as what a with statement does
    """The first SIGINT or SIGTERM ends the run behind what is under way, the second at once."""

    def __init__(self, asker: Asker, console: Console) -> None:
        self._asker, self._console = asker, console
        self._before: list[Callable[[], object]] = []

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                loop.add_signal_handler(number, self._end, signal.Signals(number))
            except (ValueError, RuntimeError):  # not in the main thread
                continue
            self._before.append(lambda number=number: loop.remove_signal_handler(number))  # type: ignore[misc]

    def __exit__(self, *error: object) -> None:
        for undo in self._before:
            undo()

    def _end(self, number: signal.Signals) -> None:
        if self._asker.stop is not None:
            self._console.show_cursor()  # which a table that is kept up to date hides
            os._exit(128 + number)
        self._console.print(f"{number.name}: waiting for what is under way; again to end at once", highlight=False)
        self._asker.end(InterruptedRunError(number.name))
