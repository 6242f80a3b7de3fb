"""``ultrafuser clean``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ultrafuser_mega.cli.options import wide_console

if TYPE_CHECKING:
    from ultrafuser_mega.cleaning.files import Source


def clean(
    out: Annotated[Path, typer.Option(help="new folder for what is kept, what is removed, and the report")],
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[[CLASS=]FILES]...",
            help="files, folders or globs of rows, as in code=data/code; without a class, each row's own",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="instead of FILES: the training files of its classes", show_default=False),
    ] = None,
    benchmarks: Annotated[
        list[Path] | None,
        typer.Option(
            "--benchmarks",
            "-b",
            help="benchmark files or a folder of them, whose items must not stand in the rows; repeatable",
            show_default=False,
        ),
    ] = None,
    rule: Annotated[
        str, typer.Option(help="share: of an item's 13-grams; any: a single one, as the paper has it")
    ] = "share",
    share: Annotated[float, typer.Option(help="of an item's 13-grams, from which on a row is a copy of it")] = 0.5,
    language: Annotated[
        list[str] | None,
        typer.Option(help="that replies may be in, as in en; repeatable; default: any", show_default=False),
    ] = None,
    near: Annotated[float, typer.Option(help="similarity from which on a question repeats another, 0 to 1")] = 0.7,
    compare: Annotated[
        str, typer.Option(help="what makes a duplicate: the same question, or the same conversation")
    ] = "question",
    min_words: Annotated[int, typer.Option(help="of a reply, at least")] = 1,
    max_words: Annotated[int, typer.Option(help="of a reply, at most")] = 4000,
    without: Annotated[
        list[str] | None, typer.Option(help="a rule that is not asked; repeatable", show_default=False)
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="that examine rows; default: one to each core", show_default=False)
    ] = None,
) -> None:
    """Remove what spoils instruction data: copies, refusals, broken code, benchmarks' items.

    \b
    ultrafuser clean text=data/text code=data/code --benchmarks data/eval --out clean
    ultrafuser clean --config my.yaml --language en --without form --out clean

    Rules, in the order in which they are asked; a row counts for the first that removes it: malformed, length, refusal,
    boilerplate, repetition, language, code, form, contaminated, exact_duplicate, near_duplicate.

    OUT/kept has what is left, line by line as it was, ready for `ultrafuser prepare`; OUT/removed.jsonl the rest, each
    row with its rule and reason; OUT/matches.jsonl what is shared with benchmarks; `ultrafuser look OUT` shows it all.
    """
    from ultrafuser_mega.cleaning.contamination import Benchmarks
    from ultrafuser_mega.cleaning.files import clean_files
    from ultrafuser_mega.cleaning.rules import Rules

    rules = Rules(
        without=frozenset(without or ()),
        min_words=min_words,
        max_words=max_words,
        languages=tuple(language or ()),
        near=near,
        compared=compare,  # type: ignore[arg-type]  # checked there
    )
    sources = _sources(files or [], config)
    index = None
    if benchmarks:
        from ultrafuser_mega.evaluation.published import published_items

        index = Benchmarks(published_items(benchmarks), rule, share)  # type: ignore[arg-type]
    report = clean_files(sources, out, rules, index, processes=processes, progress=sys.stderr.isatty())
    console = wide_console()
    for table in report.tables():
        console.print(table)
    read, kept = sum(report.read.values()), sum(report.kept.values())
    console.print(f"kept {kept:,} of {read:,} rows: {out}", markup=False, highlight=False, soft_wrap=True)


def _sources(files: list[str], config: Path | None) -> list[Source]:
    from ultrafuser_mega.cleaning.files import Source
    from ultrafuser_mega.data.files import expand_files
    from ultrafuser_mega.errors import InputError

    if bool(files) == (config is not None):
        raise InputError(
            "clean: name files, as in code=data/code/*.jsonl, or a configuration by --config, and not both"
        )
    if config is not None:
        from ultrafuser_mega.config import load_config

        data = load_config(config, []).data
        return [
            Source(path, name, one.columns.get(entry, {}))
            for name, one in data.classes.items()
            for entry in one.train
            for path in expand_files(data.root / entry)
        ]
    sources = []
    for text in files:
        name, equals, entry = text.partition("=")
        is_named = bool(equals) and not Path(text).exists()
        sources += [
            Source(path, name if is_named else None) for path in expand_files(Path(entry if is_named else text))
        ]
    return sources
