"""One process of ``ultrafuser evaluate``, from what the user asked for to the tables."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.evaluation.benchmark import Item, Sample
from ultrafuser_mega.evaluation.benchmarks import SUITES, Suite, benchmark, chosen
from ultrafuser_mega.evaluation.benchmarks.chats import AlpacaEval
from ultrafuser_mega.evaluation.benchmarks.humaneval import ProgramCheck
from ultrafuser_mega.evaluation.contestants import Computing, Contestant, contestant
from ultrafuser_mega.evaluation.judge import FileJudge, check_judge, grade_chats, judge_pairs, open_judge
from ultrafuser_mega.evaluation.programs import check_program
from ultrafuser_mega.evaluation.results import headroom, results, write_results
from ultrafuser_mega.evaluation.results_page import scores_table, write_page
from ultrafuser_mega.evaluation.rows import ORACLE, oracle_row, selected_row
from ultrafuser_mega.evaluation.run import Share, Task, run_evaluation, settings_of
from ultrafuser_mega.evaluation.sandbox import open_sandbox

_LEDGER = "judge.jsonl"  # in OUT, of an endpoint's replies


@dataclass(frozen=True)
class Judging:
    """Who judges, and what.

    Attributes:
        judge: ``openai:MODEL[@URL]`` or ``file:PATH``; None: what needs a judge has no score.
        prices: per million tokens read and written; None: cost is not counted.
        opponent: the row that AlpacaEval's replies are compared with; None: the file's own.
        select: rows, the best of whose answers the judge picks for a row more.
    """

    judge: str | None = None
    prices: tuple[float, float] | None = None
    opponent: str | None = None
    select: Sequence[str] = ()


@dataclass(frozen=True)
class Job:
    """What the user asked for; see :func:`ultrafuser_mega.cli.evaluate.evaluate`.

    ``max_new_tokens`` shortens what benchmarks allow; ``oracle`` are the rows of which the best answer to every item
    makes a row more; ``single`` is the row from which the headroom to that row is counted.
    """

    models: Sequence[str]
    suite: str
    data: Path
    out: Path
    limit: int | None
    seed: int
    computing: Computing
    max_new_tokens: int | None = None
    code_sandbox: str = "bwrap"
    judging: Judging = Judging()
    oracle: Sequence[str] = ()
    single: str | None = None


def evaluate_share(job: Job, console: Console) -> None:
    """Answer this rank's share; on rank 0 wait for the others' and write the results.

    Raises:
        InputError: a model, a benchmark or a file is not there, or the folder holds answers under other settings.
    """
    if "RANK" not in os.environ:
        _evaluate(job, Share(), console)
        return
    from ultrafuser_mega.runtime.device import end_with_launcher, launched_rank, launched_ranks, launcher_store
    from ultrafuser_mega.runtime.failure import first_failure_ends_job

    end_with_launcher()
    store = launcher_store()
    with first_failure_ends_job(store):
        computing = replace(job.computing, device=_device_of_rank(job.computing.device))
        share = Share(launched_rank(), launched_ranks(), store)
        try:
            _evaluate(replace(job, computing=computing), share, console)
        except KeyboardInterrupt:  # the launcher says how it goes on
            os._exit(128 + signal.SIGINT)


def _evaluate(job: Job, share: Share, console: Console) -> None:
    suite = _suite(job.suite)
    if job.judging.judge is not None:
        check_judge(job.judging.judge, job.judging.prices)
    contestants = [contestant(text, job.computing) for text in job.models]
    _refuse_twice(contestants)
    groups = suite.groups if job.limit is None else job.limit
    check = _program_check(job.code_sandbox, suite, share)
    tasks = []
    for name in suite.benchmarks:
        found = benchmark(name, check)
        length = min(found.max_new_tokens, job.max_new_tokens or found.max_new_tokens)
        tasks.append(Task(found, chosen(found.items(job.data), groups, job.seed), length))
    _check_rows(job, [one.name for one in contestants], tasks)
    if job.judging.judge is not None and share.rank == 0:
        # Now, and not when all is answered: the key may be missing, the ledger damaged or in another run's hands.
        open_judge(job.judging.judge, job.out / _LEDGER, job.judging.prices).ledger.close()
    settings = settings_of(contestants, tasks, job.data, job.seed, job.code_sandbox, job.computing.dtype)
    samples = run_evaluation(contestants, tasks, settings, job.out, share, console)
    if share.rank == 0:
        _write(job, [one.name for one in contestants], tasks, settings, samples)


def _write(
    job: Job, models: Sequence[str], tasks: Sequence[Task], settings: dict[str, Any], samples: Sequence[Sample]
) -> None:
    """Tables of the models and items that were asked for; the folder may hold more."""
    asked = {(task.benchmark.name, item.id) for task in tasks for item in task.items}
    kept = [s for s in samples if s.model in models and (s.benchmark, s.item) in asked]
    kept.sort(key=lambda sample: models.index(sample.model))
    if job.judging.judge is not None:
        kept = _judged(job, tasks, kept)
    if job.oracle:
        kept += oracle_row(kept, job.oracle)
    benchmarks = [task.benchmark for task in tasks]
    found = results(kept, benchmarks, settings | {"judge": job.judging.judge}, job.data)
    if job.single is not None:
        found["headroom"] = headroom(kept, benchmarks, job.single, ORACLE.format(", ".join(job.oracle)))
    write_results(job.out, found)
    print(scores_table(found))
    for line in found["not_asked"]:
        print(line)
    for name, count in found["no_verdict"].items():
        print(f"{count} items of {name} are left out: the judge gave no verdict on some answer to them")
    print(f"\nwrote {write_page(job.out, found)}")


def _check_rows(job: Job, models: Sequence[str], tasks: Sequence[Task]) -> None:
    """Refuse now what could not be compared when all is answered."""
    opponent = job.judging.opponent
    for option, rows in {
        "--oracle": job.oracle,
        "--select": job.judging.select,
        "--opponent": [opponent],
        "--single": [job.single],
    }.items():
        for row in rows:
            if row is not None and row not in models:
                raise InputError(f"{option} {row}: is no row of this table; choose of {', '.join(models)}")
    if job.judging.judge is None or opponent is not None:
        return
    for task in tasks:
        if task.benchmark.name == AlpacaEval.name and any(item.reference["output"] is None for item in task.items):
            raise InputError(
                f"{job.data / task.benchmark.source}: its rows have no output that answers could be compared with; "
                "give them AlpacaEval's own references, or --opponent a row of this table"
            )


def _judged(job: Job, tasks: Sequence[Task], samples: list[Sample]) -> list[Sample]:
    """The samples with what the judge says of them; with the row that it picks, where that was asked for."""
    assert job.judging.judge is not None
    judge = open_judge(job.judging.judge, job.out / _LEDGER, job.judging.prices)
    judged = []
    for task in tasks:
        own = [sample for sample in samples if sample.benchmark == task.benchmark.name]
        items = {item.id: item for item in task.items}
        if task.benchmark.name == AlpacaEval.name:
            own = judge_pairs(judge, own, items, _opponents(job, own, items))
        elif task.benchmark.judged:
            own = grade_chats(judge, own, items)
        judged += own
    order = {sample.model: place for place, sample in reversed(list(enumerate(samples)))}
    judged.sort(key=lambda sample: order[sample.model])
    if job.judging.select:
        judged += selected_row(judged, job.judging.select, tasks, judge, job.seed)
    spent = judge.spent
    cost = "" if spent.cost is None else f", {spent.cost:.2f} in the unit of the prices"
    print(
        f"judge {judge.name}: {spent.asked:,} replies asked, {spent.kept:,} from the ledger, "
        f"{spent.input_tokens:,} tokens read, {spent.output_tokens:,} written{cost}"
    )
    if isinstance(judge, FileJudge) and judge.listed:
        print(f"{len(judge.listed):,} replies are missing: answer {judge.requests}, and put its lines into the file")
    judge.ledger.close()
    return judged


def _opponents(job: Job, samples: Sequence[Sample], items: Mapping[str, Item]) -> dict[str, str]:
    """Item -> the reply that AlpacaEval's are compared with."""
    if job.judging.opponent is None:
        return {name: text for name, item in items.items() if (text := item.reference["output"]) is not None}
    return {sample.item: sample.replies[0] for sample in samples if sample.model == job.judging.opponent}


def _program_check(sandbox: str, suite: Suite, share: Share) -> ProgramCheck:
    """Runs programs in the sandbox, which is there if any of the suite's benchmarks needs it."""
    if not any(benchmark(name).runs_programs for name in suite.benchmarks):
        return check_program
    ask = _confirm if share.ranks == 1 else lambda question: False  # several ranks have no one to ask
    return partial(check_program, sandbox=open_sandbox(sandbox, ask))


def _confirm(question: str) -> bool:
    return sys.stdin.isatty() and input(f"{question} [yes/no] ").strip().lower() == "yes"


def _suite(text: str) -> Suite:
    if text in SUITES:
        return SUITES[text]
    names = tuple(text.split(","))
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--suite {text}: {name} stands twice; name it once")
    return Suite(names)


def _refuse_twice(contestants: Sequence[Contestant]) -> None:
    seen = set()
    for one in contestants:
        if one.name in seen:
            raise InputError(f"MODEL {one.name}: stands twice; give the second another name, as in NAME={one.address}")
        seen.add(one.name)


def _device_of_rank(device: str) -> str:
    if device != "auto":
        return device
    from ultrafuser_mega.runtime.device import choose_device

    return str(choose_device("auto"))
