"""The options of an answer: written once, the same in both commands but for one default."""

from __future__ import annotations

from pathlib import Path

import typer
from typer.testing import CliRunner

from ultrafuser_mega.cli import chat, generate
from ultrafuser_mega.cli.sampling_options import AnswerOptions, takes_answer_options


def called(arguments: list[str]) -> tuple[str, AnswerOptions]:
    """What a command gets of ``arguments``."""
    got: list[tuple[str, AnswerOptions]] = []

    @takes_answer_options(max_new_tokens=7)
    def command(model: str, *, answer: AnswerOptions) -> None:
        got.append((model, answer))

    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return got[0]


def test_options_reach_the_command_as_one_value() -> None:
    model, answer = called(
        ["m", "-n", "5", "--top-p", "0.5", "--stop", "a", "--stop", "b", "--gate-trace", "g.jsonl", "--seed", "3"]
    )
    assert model == "m"
    assert answer == AnswerOptions(max_new_tokens=5, top_p=0.5, stop=["a", "b"], gate_trace=Path("g.jsonl"), seed=3)
    assert (answer.limits.max_new_tokens, answer.limits.stop) == (5, ("a", "b"))
    assert (answer.sampling.top_p, answer.sampling.seed) == (0.5, 3)


def test_defaults_are_those_of_the_options_but_for_the_length() -> None:
    assert called(["m"])[1] == AnswerOptions(max_new_tokens=7)


def test_both_commands_have_every_option() -> None:
    wanted = {"--" + name.replace("_", "-") for name in AnswerOptions.__dataclass_fields__}
    for command, length in ((generate.generate, 256), (chat.chat, 512)):
        app = typer.Typer(rich_markup_mode=None)
        app.command()(command)
        text = CliRunner().invoke(app, ["--help"], terminal_width=200).output
        assert all(option in text for option in wanted)
        assert f"[default: {length}]" in text
