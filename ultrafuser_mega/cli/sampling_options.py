"""Options that ``generate`` and ``chat`` share: those of an answer, written once and put into both signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:  # importing them for a --help would take seconds
    from ultrafuser_mega.inference.answer import Limits
    from ultrafuser_mega.inference.embedded import Serving
    from ultrafuser_mega.inference.sampling import Sampling

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="release, checkpoint, run (runs/<name>) or model folder; @NAME: one specialist; +RULE: mixed otherwise",
        show_default=False,
    ),
]
System = Annotated[str | None, typer.Option(help="system text before the conversation", show_default=False)]


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How answers are drawn, where they are computed and what is kept of them; a field is an option."""

    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="longest answer, in tokens")]
    temperature: Annotated[float, typer.Option(help="0: the most likely token; above: draws")] = 0.0
    top_k: Annotated[int, typer.Option(help="draw from the k most likely tokens; 0: all")] = 0
    top_p: Annotated[float, typer.Option(help="draw from the most likely tokens that add up to this probability")] = 1.0
    min_p: Annotated[float, typer.Option(help="draw from tokens at least this times as likely as the likeliest")] = 0.0
    repetition_penalty: Annotated[float, typer.Option(help="above 1 discourages tokens that were there before")] = 1.0
    stop: Annotated[
        list[str] | None, typer.Option(help="text that ends an answer and is left out; repeatable", show_default=False)
    ] = None
    seed: Annotated[int, typer.Option(help="of the draws")] = 0
    gate_trace: Annotated[
        Path | None, typer.Option(help="JSONL to write: gate weights of every token", show_default=False)
    ] = None
    draft: Annotated[
        int | None,
        typer.Option(
            help="tokens that the leading specialist drafts for the others to check, or that are guessed for a "
            "model alone, for the same answer sooner; 0: none; default: 8, where each specialist has a device none",
            show_default=False,
        ),
    ] = None
    memory: Annotated[
        float | None,
        typer.Option(help="GiB for the caches of all specialists; default: by what is free", show_default=False),
    ] = None
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:N, or one per specialist: cuda:0,cuda:1,cuda:2")] = "auto"
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: as stored", show_default=False)] = None

    @property
    def limits(self) -> Limits:
        """Where an answer ends."""
        from ultrafuser_mega.inference.answer import Limits

        return Limits(self.max_new_tokens, tuple(self.stop or ()))

    def serving(self, rows: int) -> Serving:
        """How they are computed, ``rows`` at a time."""
        from ultrafuser_mega.inference.embedded import Serving

        return Serving(rows, self.memory, self.draft)

    @property
    def sampling(self) -> Sampling:
        """How its tokens are chosen."""
        from ultrafuser_mega.inference.sampling import Sampling

        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, self.seed)


def takes_answer_options(*, max_new_tokens: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, in place of its last parameter ``answer: AnswerOptions``, all options of an answer.

    Args:
        max_new_tokens: its default, the one that commands do not share.
    """
    hints = get_type_hints(AnswerOptions, include_extras=True)
    defaults = {field.name: field.default for field in fields(AnswerOptions)} | {"max_new_tokens": max_new_tokens}
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])
        for name, default in defaults.items()
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [parameter for name, parameter in signature.parameters.items() if name != "answer"]

        @wraps(command)
        def with_options(**values: Any) -> None:
            answer = AnswerOptions(**{name: values.pop(name) for name in defaults})
            command(**values, answer=answer)

        with_options.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        return with_options

    return decorate
