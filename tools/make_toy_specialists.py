"""Make the toy specialists by hand: a thin script over ``ultrafuser_mega.toy``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ultrafuser_mega.errors import EXIT_BAD_INPUT, InputError
from ultrafuser_mega.toy import ToyFolders, ToyRecipe, make_toy


def main(
    out: Annotated[Path, typer.Option(help="Folder to make them in; a finished one is reused.")] = Path("toy"),
    seed: Annotated[int, typer.Option(help="Seed of the data, the weights and the order of training.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1, ...")] = "cpu",
    branched: Annotated[bool, typer.Option(help="All of one shape, trained on from one base model, kept too.")] = False,
) -> None:
    """Make three small specialists to fuse: text, code and math.

    Each is a Llama of 0.4 million parameters, really trained on generated
    instructions of ONE class (about a minute for all three on two cores).
    They differ as Llama-2, CodeLlama and WizardMath do: prompt template,
    vocabulary rows (V, V+16, V+1), rope theta (1e4, 1e6, 1e4); --branched
    ones in the template alone, so that their weights can be merged.

    \b
    OUT/text  OUT/code  OUT/math    Hugging Face folders, for AutoModel...
    OUT/data/CLASS.train.jsonl      what each was trained on
    OUT/data/CLASS.heldout.jsonl    rows of no training file: the table's
    OUT/data/CLASS.tasks.jsonl      instructions whose replies can be checked
    OUT/base                        with --branched: where all three began
    OUT/recipe.json                 seed, sizes and losses

    The table at the end shows why there is something to fuse: every
    specialist knows its own class and is lost in the others.
    """
    start = time.monotonic()
    try:
        toy = make_toy(out, seed=seed, device=device, recipe=ToyRecipe(branched=branched))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_BAD_INPUT) from None
    console = Console()
    console.print(_loss_table(toy))
    console.print(f"{toy.root}: ready after {time.monotonic() - start:.0f} s")


def _loss_table(toy: ToyFolders) -> Table:
    table = Table(title="held-out loss, nats per response token")
    table.add_column("specialist")
    for name in toy.heldout_loss:
        table.add_column(name, justify="right")
    table.add_column("mean", justify="right")
    for specialist, losses in toy.heldout_loss.items():
        cells = (f"[bold]{loss:.3f}[/]" if name == specialist else f"{loss:.3f}" for name, loss in losses.items())
        table.add_row(specialist, *cells, f"{sum(losses.values()) / len(losses):.3f}")
    return table


if __name__ == "__main__":
    typer.run(main)
