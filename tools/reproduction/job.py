"""All of a reproduction: specialists, runs, accuracies, then the page."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reproduction.claims import claims
from reproduction.experiments import Experiment, addresses, experiments, missing
from reproduction.figures import draw
from reproduction.measured import Measured, read_accuracies, read_seed
from reproduction.page import write_page
from reproduction.runner import Job, run, say
from reproduction.trios import Asked, Trio, make_trio
from reproduction.verdicts import counted
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.evaluation.results import RESULTS_FILE, versions
from ultrafuser_mega.evaluation.sandbox import open_sandbox

_TASKS, _QUICK_TASKS = 100, 25  # of each class, for every model
_NOT_RUN = "not run with every seed"


def reproduce(asked: Asked) -> Path:
    """Run what is missing, then write the page; returns it.

    Raises:
        InputError: the configuration is wrong, or the folder holds results under other settings.
        ExperimentError: a run failed.
        StoppedError: a signal came.
    """
    begun = time.monotonic()
    trios = []
    for seed in asked.seeds:
        say(f"seed {seed}: specialists and data")
        trios.append(make_trio(asked, seed))
    logs = {trio.seed: trio.root / "logs" for trio in trios}
    stores = [Job(trio.seed, token_store(trio), logs[trio.seed]) for trio in trios]
    if not asked.so_far:
        run(stores, asked.jobs, "token stores")
    # Stopped at any time, all seeds are equally far, and there is a page to be had of what all have.
    rows = zip(*(experiments(trio) for trio in trios), strict=True)
    jobs = [Job(trio.seed, one, logs[trio.seed]) for row in rows for trio, one in zip(trios, row, strict=True)]
    if not asked.so_far:
        run(jobs, asked.jobs, "runs")
    first = trios[0]
    measured = Measured(list(asked.seeds), list(first.config.data.classes), list(first.config.specialists))
    measured.left_out |= missing(first)
    measured.left_out |= {job.experiment.row: _NOT_RUN for job in jobs if not job.experiment.is_done}
    measured.left_out |= {job.experiment.row: job.left_out.read_text().strip() for job in jobs if job.left_out.exists()}
    ask_tasks(asked, trios, lambda trio: addresses(trio, [one for one in experiments(trio) if one.is_done]), measured)
    for trio in trios:
        read_seed(measured, trio, experiments(trio))
    measured.complete()
    found = claims(measured)
    page = write_page(
        asked.out, measured, found, _facts(asked, time.monotonic() - begun), draw(asked.out, measured, trios)
    )
    print(counted(claim for claim in found if claim.paper))
    return page


def ask_tasks(
    asked: Asked,
    trios: Sequence[Trio],
    models: Callable[[Trio], Mapping[str, str]],
    measured: Measured,
    key: str = "accuracy",
) -> None:
    """Have models answer tasks whose replies can be checked, and add what they had right, where there are tasks.

    Args:
        asked: whether to run what is missing, and how many tasks.
        trios: of all seeds.
        models: row -> address, of a trio's models.
        measured: is added to; says what was left out.
        key: of files and of the folder of answers.
    """
    asking = [trio for trio in trios if trio.tasks is not None]
    if not asking:
        return
    if why := _without_sandbox():
        measured.left_out["accuracy on code"] = why
    suite = "toy_text,toy_math" if why else "toy"
    jobs = [Job(trio.seed, _accuracy(asked, trio, suite, models(trio), key), trio.root / "logs") for trio in asking]
    if not asked.so_far:
        run(jobs, asked.jobs, "accuracies")
    if not all(job.experiment.is_done for job in jobs):
        measured.left_out["accuracies"] = _NOT_RUN
        return
    for job in jobs:
        read_accuracies(measured, job.experiment.result)


def token_store(trio: Trio) -> Experiment:
    """What all runs of the fused configuration read; made before they share it."""
    command = ("prepare", "--config", str(trio.config_path))
    return Experiment("token store", "prepare", command, trio.config.store_dir / "manifest.json")


def _without_sandbox() -> str:
    """Why programs that models write cannot be run here; "" where they can."""
    try:
        open_sandbox("bwrap", lambda question: False)
    except InputError as error:
        return str(error)
    return ""


def _accuracy(asked: Asked, trio: Trio, suite: str, rows: Mapping[str, str], key: str) -> Experiment:
    out = trio.root / key
    if (found := out / RESULTS_FILE).is_file() and not rows.keys() <= json.loads(found.read_text())["models"].keys():
        found.unlink()  # of fewer models: what they answered is kept, and not asked again
    command = ["evaluate", *(f"{row}={address}" for row, address in rows.items())]
    limit = str(_QUICK_TASKS if asked.quick else _TASKS)
    command += ["--suite", suite, "--data", str(trio.tasks), "--out", str(out), "--limit", limit]
    command += ["--oracle", ",".join(trio.config.specialists)]
    return Experiment("accuracies", key, tuple(command), out / RESULTS_FILE)


def facts_here(asked: Asked) -> dict[str, Any]:
    """What results were made with."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=here)
    own = versions()
    return {
        "options": " ".join(sys.argv[1:]),
        "seeds": ", ".join(map(str, asked.seeds)),
        "commit": commit.stdout.strip() or "no git repository",
        "machine": f"{platform.machine()}, {_processor()}, {asked.jobs} runs side by side",
        "versions": ", ".join(f"{name} {own[name]}" for name in ("python", "torch", "transformers") if name in own),
        "specialists": "the branched toy, made for each seed" if asked.config is None else str(asked.config),
    }


def _facts(asked: Asked, seconds: float) -> dict[str, Any]:
    # What an interrupted start took is not in this one's time.
    took = asked.out / "seconds.json"
    before = json.loads(took.read_text()) if took.is_file() else 0.0
    took.write_text(json.dumps(before + seconds))
    return facts_here(asked) | {"time": f"{(before + seconds) / 60:.0f} minutes"}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
