"""The paper's tables and figures on small models, with seeds, intervals and a verdict on every claim.

    python tools/reproduce_paper.py --out reproduction                  # three seeds
    python tools/reproduce_paper.py --out reproduction --quick          # two seeds, fewer steps and tasks
    python tools/reproduce_paper.py --out nano --config examples/configs/nano_real.yaml models=DIR data.root=DIR

OUT/results.md has the claims and tables, OUT/claims.json every number that decided, OUT/seed-N all runs with their
configurations. Interrupted, the same command goes on where it was; more seeds can be added later. With --so-far it runs
nothing and writes the page of what is there: all seeds are equally far.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from reproduction.ends import refused, told

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.runtime.quiet import quiet_dependencies

_SEEDS, _QUICK_SEEDS = "0,1,2", "0,1"


def main(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="of the configuration", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of everything")] = Path("reproduction"),
    seeds: Annotated[
        str | None, typer.Option(help=f"default: {_SEEDS}, with --quick {_QUICK_SEEDS}", show_default=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="fewer seeds, steps and tasks")] = False,
    config: Annotated[
        Path | None,
        typer.Option(help="of other specialists; default: the toy's, made for each seed", show_default=False),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="with --config: model that they were trained from", show_default=False)
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option(help="with --config: folder of CLASS.tasks.jsonl", show_default=False)
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="processes side by side")] = 2,
    so_far: Annotated[bool, typer.Option("--so-far", help="run nothing; the page of what is there")] = False,
) -> None:
    """Reproduce the paper's tables 1 (losses, accuracies), 2, 3, 4, 6, 8 and figures 5, 6, 7, 8/9."""
    try:
        if config is None and (base or tasks):
            raise InputError("--base, --tasks: belong to --config; give one")
        chosen = _seeds(seeds or (_QUICK_SEEDS if quick else _SEEDS))
    except InputError as error:
        raise refused(error) from None
    quiet_dependencies()
    # Behind the options: torch and Megatron take seconds, and say much that is as it should be.
    from reproduction.job import reproduce
    from reproduction.trios import Asked

    told(lambda: reproduce(Asked(out, chosen, quick, config, overrides or (), base, tasks, jobs, so_far)))


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise InputError(f"--seeds {text}: expected different whole numbers, as in 0,1,2")
    return [int(part) for part in parts]


if __name__ == "__main__":
    typer.run(main)
