"""``ultrafuser report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ultrafuser_mega.cli.options import wide_console


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of runs, as in runs/demo")],
    plot: Annotated[Path, typer.Option(help="PNG that receives the curves")] = Path("report.png"),
) -> None:
    """Summarise a run, or compare several: losses, speed, where the time went, and what differs in their settings.

    Speed and phases are of the last stage's steps. Works while runs train as well. Curves go to report.png unless
    --plot says otherwise.
    """
    from ultrafuser_mega.errors import writing
    from ultrafuser_mega.reporting.comparison import comparison_tables, read_runs

    found = read_runs(runs)
    console = wide_console(max(100, 40 + 40 * len(found)))
    for table in comparison_tables(found):
        console.print(table)
    from ultrafuser_mega.reporting.plots import plot_comparison

    with writing(plot):
        plot_comparison(plot, {run.name: (run.steps, run.evals) for run in found})
    console.print(f"curves: {plot}", markup=False, highlight=False, soft_wrap=True)
