"""What one node can do, on small models: training a part instead of everything, and one model out of the fused one.

    python tools/compare_variants.py adapters --out adapters --quick --rows 'everything,adapters of rank 8@5e-3'
    python tools/compare_variants.py students --out students --quick
    python tools/compare_variants.py students --out nano --run runs/nano_real stage2.steps=100

Without --run every seed makes toy specialists of its own and fuses them, as tools/reproduce_paper.py does, whose --out
may be given; with it a seed is another order of samples. OUT/adapters.md or OUT/students.md has the table, OUT/seed-N
all runs with their configurations. Interrupted, the same command goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from reproduction.ends import told

from ultrafuser_mega.runtime.quiet import quiet_dependencies

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=__doc__)

_Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="of the configuration", show_default=False)
]
_Out = Annotated[Path, typer.Option(help="folder of everything")]
_Seeds = Annotated[str, typer.Option(help="repetitions")]
_Quick = Annotated[bool, typer.Option("--quick", help="fewer steps and held-out samples")]
_Run = Annotated[Path | None, typer.Option(help="a finished run to begin with; default: toys, made for each seed")]
_Rows = Annotated[str, typer.Option(help="some kinds, with stage2.lr or the run's: KIND@5e-4,KIND; default: all")]
_Jobs = Annotated[int, typer.Option(min=1, help="processes side by side")]


@app.command()
def adapters(
    out: _Out,
    overrides: _Overrides = None,
    seeds: _Seeds = "0",
    quick: _Quick = False,
    run: _Run = None,
    rows: _Rows = "",
    jobs: _Jobs = 1,
) -> None:
    """Stage 2 from one checkpoint of stage 1: everything, adapters of two ranks, gate and heads."""
    from reproduction.compare import Comparing, compare_adapters

    told(lambda: compare_adapters(Comparing.of(out, seeds, quick, run, rows, jobs, overrides or [])))


@app.command()
def students(
    out: _Out,
    overrides: _Overrides = None,
    into: Annotated[str, typer.Option(help="the specialist that the student begins as")] = "text",
    seeds: _Seeds = "0,1,2",
    quick: _Quick = False,
    run: _Run = None,
    base: Annotated[Path | None, typer.Option(help="with --run: model that its specialists were trained from")] = None,
    steps: Annotated[
        int | None, typer.Option(min=2, help="of a student; default: as many samples as the fused run takes")
    ] = None,
    rows: _Rows = "",
    jobs: _Jobs = 1,
) -> None:
    """Merged, trained on labels, and distilled in every way, for equally many steps and samples."""
    from reproduction.compare import Comparing, compare_students

    told(lambda: compare_students(Comparing.of(out, seeds, quick, run, rows, jobs, overrides or [], into, base, steps)))


if __name__ == "__main__":
    quiet_dependencies()
    app()
