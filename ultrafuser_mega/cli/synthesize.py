"""``ultrafuser synthesize``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ultrafuser_mega.cli.options import Overrides, wide_console

if TYPE_CHECKING:
    from rich.console import Console

    from ultrafuser_mega.synthesis.config import SynthesisConfig
    from ultrafuser_mega.synthesis.pipeline import Outcome


def synthesize(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="YAML file, as examples/synthesis/paper.yaml", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="folder of the data and of the ledger", show_default=False)],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="calls, tokens, money and GPU-hours of every step; asks nothing")
    ] = False,
    review: Annotated[
        bool, typer.Option("--review", help="stop behind every list, which then can be edited, until it was looked at")
    ] = False,
) -> None:
    """Make instruction data: topics, sub-topics, instructions, responses, by models behind endpoints.

    \b
      ultrafuser synthesize --config examples/synthesis/paper.yaml --out ultrachat --dry-run
      ultrafuser synthesize --config examples/synthesis/paper.yaml --out ultrachat limit.money=50
      ultrafuser synthesize --config mine.yaml --out mine --review

    Keys come from the environment (OPENAI_API_KEY, or what endpoints.NAME.key names) and are kept nowhere. Every
    request and reply is in OUT/ledger.sqlite: whatever ends the run, the same command goes on and asks only what is
    missing; a finished run asks nothing. OUT/data holds the rows, one file a class, as `ultrafuser prepare` takes them.
    Exit codes: 0 finished, or waiting for a review; 2 bad input or an endpoint; 4 a limit is reached; 75 ended by
    SIGTERM, 130 by Ctrl-C.
    """
    from rich.console import Console

    from ultrafuser_mega.config.load import read_config
    from ultrafuser_mega.errors import EXIT_GO_ON, EXIT_LIMIT
    from ultrafuser_mega.synthesis.budget import LimitReachedError
    from ultrafuser_mega.synthesis.client import InterruptedRunError
    from ultrafuser_mega.synthesis.config import SynthesisConfig

    loaded = read_config(SynthesisConfig, config, overrides or [])
    if dry_run:
        _show_estimate(loaded, out, wide_console())
        return
    from ultrafuser_mega.synthesis.pipeline import synthesize as run

    console = Console(stderr=True)
    again = f"the same command goes on from {out}"
    try:
        outcome = run(loaded, out, review=review, console=console)
    except LimitReachedError as reached:
        console.print(f"stopped: {reached}; with a higher limit {again}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"left to do: {_left(loaded, out)}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_LIMIT) from None
    except InterruptedRunError as signal:
        console.print(f"ended by {signal}; {again}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130 if str(signal) == "SIGINT" else EXIT_GO_ON) from None
    _show(outcome, loaded, out, wide_console())


def _show(outcome: Outcome, config: SynthesisConfig, out: Path, console: Console) -> None:
    console.print(outcome.progress.table())
    lines = [outcome.progress.line()]
    if outcome.lost.requests:
        lost = outcome.lost
        lines.append(
            f"{lost.requests:,} requests got no reply that could be kept and may have been paid for: at most "
            f"{lost.tokens:,} tokens, {config.currency}{lost.cost:.4f}"
        )
    for path in outcome.to_review:
        lines.append(f"to look through: {path}; edit it, then the same command goes on from what it holds")
    rows = 0
    for path in outcome.files:
        with path.open(encoding="utf-8") as file:
            count = sum(1 for _ in file)
        lines.append(f"{path}: {count:,} rows")
        rows += count
    if rows:
        from ultrafuser_mega.looking import look

        lines.append(f"{look([out], out / 'page.html', title=config.name)} shows topics, lengths and samples")
    if outcome.files:
        lines.append(f"{out / 'README.md'} says what is in it; {out / 'left_out.jsonl'} what is not, and why")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _left(config: SynthesisConfig, out: Path) -> str:
    """What the whole set is expected to take beyond what the ledger holds."""
    from ultrafuser_mega.synthesis.estimate import estimate

    left = [(one.step, one.of, one.calls - one.measured, one) for one in estimate(config, out)]
    more = [(of, step, calls, one) for step, of, calls, one in left if calls > 0]
    calls = sum(calls for _, _, calls, _ in more)
    tokens = sum(round((one.read + one.written) * calls / one.calls) for _, _, calls, one in more)
    money = sum(one.money * calls / one.calls for _, _, calls, one in more)
    steps = ", ".join(f"{of} {step} {calls:,}" for of, step, calls, _ in more)
    return f"about {calls:,} calls, {tokens:,} tokens, {config.currency}{money:,.2f} ({steps})"


def _show_estimate(config: SynthesisConfig, out: Path, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    from ultrafuser_mega.synthesis.estimate import estimate

    table = Table(box=None, pad_edge=False)
    for name in ("class", "step", "model"):
        table.add_column(name)
    for name in ("calls", "tokens read", "written", escape(config.currency), "GPU-hours", "measured on"):
        table.add_column(name, justify="right")
    found = estimate(config, out)
    for one in found:
        model = config.models[config.step(one.of, one.step).model]
        hours = "-" if one.gpu_hours is None else f"{one.gpu_hours:,.1f}"
        money = "-" if model.price is None else f"{one.money:,.2f}"
        numbers = (f"{one.calls:,}", f"{one.read:,}", f"{one.written:,}", money, hours)
        table.add_row(one.of, one.step, escape(model.model), *numbers, f"{one.measured:,}" if one.measured else "-")
    all_hours = sum(one.gpu_hours or 0.0 for one in found)
    totals = (sum(one.calls for one in found), sum(one.read for one in found), sum(one.written for one in found))
    table.add_row(
        *("all", "", "", *(f"{total:,}" for total in totals), f"{sum(one.money for one in found):,.2f}"),
        *(f"{all_hours:,.1f}" if all_hours else "-", ""),
        style="bold",
    )
    console.print(table)
    console.print(
        "Replies that cannot be used and instructions that repeat others come on top; nothing was asked.",
        highlight=False,
        soft_wrap=True,
    )
