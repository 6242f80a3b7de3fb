"""All of a comparison of variants: specialists, runs, what they take, then the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reproduction.experiments import Experiment, addresses
from reproduction.job import ask_tasks, facts_here, token_store
from reproduction.measured import Measured, read_seed
from reproduction.runner import Job, run, say
from reproduction.trios import Asked, Trio, make_trio
from reproduction.variants import LABELS, LESSONS, TRAINED, Compared, adapters, fused_run, parse_rows, students
from reproduction.variants_page import Cost, adapters_page, median_seconds, students_page
from ultrafuser_mega.config import load_config
from ultrafuser_mega.dry_run.processes import rehearse_ranks
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.planning.preflight import laid_out
from ultrafuser_mega.planning.trained import part_shares
from ultrafuser_mega.reporting.records import YARDSTICKS


@dataclass(frozen=True)
class Comparing:
    """What the user asked for: the seeds' specialists, and what is compared."""

    asked: Asked
    compared: Compared

    @classmethod
    def of(
        cls,
        out: Path,
        seeds: str,
        quick: bool,
        fused: Path | None,
        rows: str,
        jobs: int,
        overrides: Sequence[str],
        into: str | None = None,
        base: Path | None = None,
        steps: int | None = None,
    ) -> Comparing:
        """Of the command line; raises InputError for what is none."""
        chosen = parse_rows(rows, TRAINED if into is None else LESSONS)
        try:
            numbers = [int(seed) for seed in seeds.split(",")]
        except ValueError:
            raise InputError(f"--seeds {seeds}: expected whole numbers, as in 0,1,2") from None
        if len(set(numbers)) < len(numbers):
            raise InputError(f"--seeds {seeds}: a repetition of the same numbers is none; give each seed once")
        config = None
        if base is not None and fused is None:
            raise InputError("--base: belongs to --run; give one")
        if base is not None and not (base / "config.json").is_file():
            raise InputError(f"--base {base}: holds no config.json; give a model's folder")
        if fused is not None:
            fused, config = fused.absolute(), fused.absolute() / "config.yaml"
            if not (fused / "summary.json").is_file():
                raise InputError(f"--run {fused}: is no finished run; give one's folder")
        asked = Asked(out, numbers, quick, config, overrides, base=base and base.absolute(), jobs=jobs)
        return cls(asked, Compared(chosen, into or "", fused, steps))


def compare_adapters(comparing: Comparing) -> Path:
    """What stage 2 trains; returns the page.

    Raises:
        InputError, ExperimentError, StoppedError: as ``reproduction.job.reproduce``.
    """
    trios, runs = _run_all(comparing, adapters)
    costs, of_kind = {}, dict[str, Cost]()
    for row, one in zip(comparing.compared.rows, runs[0], strict=True):
        assert one.run_dir is not None
        if row.kind not in of_kind:
            say(f"what {row.kind} takes")
            of_kind[row.kind] = _cost(one.run_dir / "config.yaml")
        costs[one.row] = replace(of_kind[row.kind], seconds=median_seconds(one.run_dir))
    measured = _measured(comparing, trios, runs)
    return adapters_page(comparing.asked.out, measured, costs, _facts(comparing))


def compare_students(comparing: Comparing) -> Path:
    """One model out; returns the page. Raises as :func:`compare_adapters`."""
    asked, compared = comparing.asked, comparing.compared
    specialists = load_config(asked.config, list(asked.overrides)).specialists
    if compared.into not in specialists:
        raise InputError(f"--into {compared.into}: there is no such specialist; use {', '.join(specialists)}")
    trios, runs = _run_all(comparing, students)
    measured = _measured(comparing, trios, runs)
    own = {trio.seed: [fused_run(trio, compared), *found] for trio, found in zip(trios, runs, strict=True)}

    def models(trio: Trio) -> dict[str, str]:
        found = addresses(trio, [one for one in own[trio.seed] if one.is_done])
        return {row: address for row, address in found.items() if row not in YARDSTICKS}

    ask_tasks(asked, trios, models, measured, f"students-accuracy{compared.suffix}")
    measured.complete()
    labels = [str(row) for row in compared.rows if row.kind == LABELS]
    learned = [str(row) for row in compared.rows if row.kind != LABELS]
    return students_page(asked.out, measured, learned, labels, _facts(comparing) | measured.left_out)


def _run_all(
    comparing: Comparing, experiments: Callable[[Trio, Compared], list[Experiment]]
) -> tuple[list[Trio], list[list[Experiment]]]:
    asked, compared = comparing.asked, comparing.compared
    if compared.fused is not None:
        _refuse_other_samples(asked, compared.fused)
    trios = []
    for seed in asked.seeds:
        say(f"seed {seed}: specialists and data")
        trios.append(make_trio(asked, seed))

    def jobs(make: Callable[[Trio], list[Experiment]]) -> list[Job]:
        return [Job(trio.seed, one, trio.root / "logs") for trio in trios for one in make(trio)]

    if compared.fused is None:
        run(jobs(lambda trio: [token_store(trio)]), asked.jobs, "token stores")
        run(jobs(lambda trio: [fused_run(trio, compared)]), asked.jobs, "fused runs")
    run(jobs(lambda trio: experiments(trio, compared)), asked.jobs, "variants")
    return trios, [experiments(trio, compared) for trio in trios]


def _refuse_other_samples(asked: Asked, fused: Path) -> None:
    """Rows of the run that all begin with stand in the same table."""
    wanted = load_config(asked.config, list(asked.overrides)).evaluation.samples_per_class
    had = load_config(fused / "config.yaml").evaluation.samples_per_class
    if wanted != had:
        raise InputError(
            f"evaluation.samples_per_class={wanted}: the run {fused} was evaluated on {had} samples of a class, and "
            "its losses stand in the same table; leave it out"
        )


def _measured(comparing: Comparing, trios: Sequence[Trio], runs: Sequence[Sequence[Experiment]]) -> Measured:
    first = trios[0].config
    measured = Measured(list(comparing.asked.seeds), list(first.data.classes), list(first.specialists))
    for trio, own in zip(trios, runs, strict=True):
        read_seed(measured, trio, [fused_run(trio, comparing.compared), *own])
    measured.complete()
    return measured


def _cost(config: Path) -> Cost:
    overrides = ["checkpoint.start=null"]
    (rehearsal,) = rehearse_ranks([0], 1, "cpu", config, overrides)
    (part,) = (part for part in rehearsal.parts if part.name == "stage 2")
    shares = part_shares(laid_out(load_config(config, overrides), 1), 2)
    return Cost(sum(share.trained for share in shares), part.peak)


def _facts(comparing: Comparing) -> dict[str, Any]:
    asked = comparing.asked
    found = facts_here(asked)
    if comparing.compared.fused is not None:
        found["specialists"] = f"those of the run {comparing.compared.fused.name}, the same for all seeds"
    return found
