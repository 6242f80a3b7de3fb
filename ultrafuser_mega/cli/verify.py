"""``ultrafuser verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ultrafuser_mega.convert import SAMPLE_TEXT
from ultrafuser_mega.errors import InputError


def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="Hugging Face folder; with B also a checkpoint or release")],
    b: Annotated[
        str | None, typer.Argument(metavar="[B]", help="compare A with this instead of with itself", show_default=False)
    ] = None,
    tp: Annotated[int, typer.Option(help="tensor-parallel size, without B", min=1)] = 1,
    pp: Annotated[int, typer.Option(help="pipeline-parallel size, without B", min=1)] = 1,
    sequence_parallel: Annotated[bool, typer.Option("--sequence-parallel", help="also shard the sequence")] = False,
    text: Annotated[str, typer.Option(help="real text to compare on")] = SAMPLE_TEXT,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="largest accepted difference of a float32 logit, in parts of the largest logit "
            "[default: what rounding can do to this model's logits, measured]",
            show_default=False,
            min=0.0,
        ),
    ] = None,
) -> None:
    """Compare a sharded specialist with transformers, or two models with each other.

    With A alone: runs it on tp x pp processes of this machine, on random and on real tokens, and prints the largest
    difference of a float32 logit. With A and B: any two of Hugging Face folder, CHECKPOINT@specialist:NAME,
    CHECKPOINT@fused, RELEASE@specialist:NAME, RELEASE@fused; runs/<name> is its newest checkpoint. Prints JSON. Needs
    memory for a whole model in float32. Exit code 1 when a difference is above the tolerance, or NaN.
    """
    if b is not None:
        if (tp, pp, sequence_parallel) != (1, 1, False):
            raise InputError("--tp, --pp, --sequence-parallel: shard A compared with itself; leave them out with B")
        from ultrafuser_mega.convert.compare import compare

        comparison = compare(a, b, text, tolerance)
        print(comparison.to_json())
        raise typer.Exit(0 if comparison.equal else 1)

    from ultrafuser_mega.convert.verify import verification_batches, verify_specialist

    folder = Path(a)
    batches = verification_batches(folder, text, multiple=tp)
    comparison = verify_specialist(folder, tp, pp, batches, sequence_parallel=sequence_parallel, tolerance=tolerance)
    for found in comparison.batches:
        print(
            f"{found.what} tokens {found.shape[:2]}: max abs logit difference {found.max_abs:.3g}, "
            f"{found.relative:.2g} of the largest logit, same top token at {found.top1:.2%} of positions"
        )
    print(
        f"{'equal' if comparison.equal else 'DIFFERENT'} within {comparison.tolerance:.2g} of the largest logit"
        f"{' (what rounding explains)' if tolerance is None else ''} at tp={tp} pp={pp}"
    )
    raise typer.Exit(0 if comparison.equal else 1)
