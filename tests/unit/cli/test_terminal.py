"""What a person sees: colours on terminals only, no escape sequences from the model, a conversation with commands."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console
from support.release_prompts import STEPS
from transformers import PreTrainedTokenizerFast

from ultrafuser_mega.cli.terminal import AnswerPrinter, chat
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.answer import Answerer, Limits, Shown
from ultrafuser_mega.inference.batch import TraceFile
from ultrafuser_mega.inference.model import OpenedModel
from ultrafuser_mega.inference.sampling import Sampling
from ultrafuser_mega.inference.text_engine import Answer, TracedToken

LIMITS, GREEDY = Limits(STEPS), Sampling()


@pytest.fixture
def answerer(model: Any, release: Any) -> Answerer:
    return Answerer(OpenedModel(model, PreTrainedTokenizerFast.from_pretrained(release), frozenset({2})))


class Scripted:
    """An answerer that says what it is told; remembers the conversations it was asked."""

    names = ("text", "code")

    def __init__(self, *tokens: TracedToken) -> None:
        self.tokens = list(tokens)
        self.asked: list[list[dict[str, str]]] = []

    def encode(self, conversation: Any) -> Any:
        if any("refused" in message["content"] for message in conversation):
            raise InputError("messages: code: the chat template refuses the conversation: no system here")
        return list(conversation)

    def stream(
        self, prompts: Any, limits: Any, sampling: Any, *, lead: Any = True
    ) -> Iterator[Shown | tuple[int, Answer]]:
        self.asked += prompts
        for token in self.tokens:
            yield Shown(0, token.text, token.weights)
        yield 0, Answer("".join(token.text for token in self.tokens), self.tokens, "eos")


def printer(terminal: bool, names: Any = Scripted.names) -> tuple[AnswerPrinter, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, color_system="truecolor" if terminal else None, width=80)
    return AnswerPrinter(names, console), file


def test_a_token_has_the_colour_of_the_specialist_that_leads_it() -> None:
    shown, file = printer(terminal=True)
    answerer: Any = Scripted(TracedToken(5, "hello", [0.9, 0.1]), TracedToken(6, " world", [0.2, 0.8]))
    shown.stream(answerer, {}, LIMITS, GREEDY)
    assert "\x1b[38;2;0;114;178mhello\x1b[0m\x1b[38;2;213;94;0m world\x1b[0m" in file.getvalue()
    assert "text 55%" in file.getvalue() and "code 45%" in file.getvalue() and "2 tokens, eos" in file.getvalue()


def test_on_a_terminal_of_few_colours_no_two_specialists_look_alike() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    assert len(set(AnswerPrinter(list("abcdef"), console)._styles)) == 6


def test_without_a_terminal_there_is_the_text_and_nothing_else() -> None:
    shown, file = printer(terminal=False)
    answerer: Any = Scripted(TracedToken(5, "\ta [b]c[/b]\r\n" * 20, [0.9, 0.1]))
    shown.stream(answerer, {}, LIMITS, GREEDY)
    assert file.getvalue() == "\ta [b]c[/b]\r\n" * 20 + "\n"


def test_escape_sequences_of_the_model_do_not_reach_the_terminal() -> None:
    shown, file = printer(terminal=True)
    answerer: Any = Scripted(TracedToken(5, "\x1b]0;owned\x07\r\x9b2J", [1.0, 0.0]))
    shown.stream(answerer, {}, LIMITS, GREEDY)
    assert "owned" in file.getvalue()
    assert not {"\x1b]", "\x07", "\r", "\x9b"} & {file.getvalue()[i : i + n] for i in range(200) for n in (1, 2)}


def talk(answerer: Any, *lines: str | type[BaseException], system: str | None = None) -> list[str]:
    """What was said beside answers."""
    said: list[str] = []
    script = iter(lines)

    def read(prompt: str) -> str:
        line = next(script, EOFError)
        if isinstance(line, str):
            return line
        raise line

    chat(
        answerer,
        printer(False, answerer.names)[0],
        TraceFile(None, answerer.names),
        LIMITS,
        GREEDY,
        system,
        read,
        said.append,
    )
    return said


def test_a_conversation_grows_by_both_sides_words() -> None:
    answerer = Scripted(TracedToken(5, "yes", [1.0, 0.0]))
    talk(answerer, "one", "", "two", system="Be short.")
    roles = [[(m["role"], m["content"]) for m in asked] for asked in answerer.asked]
    opening = [("system", "Be short."), ("user", "one")]
    assert roles == [opening, [*opening, ("assistant", "yes"), ("user", "two")]]


def test_commands_change_the_conversation_and_unknown_ones_are_named() -> None:
    answerer = Scripted(TracedToken(5, "yes", [1.0, 0.0]))
    said = talk(
        answerer, "one", "/reset", "two", "/system In German.", "three", "/system", "four", "/wat", "/exit", "no"
    )
    assert [[m["content"] for m in asked] for asked in answerer.asked] == [
        ["one"],
        ["two"],
        ["In German.", "three"],
        ["four"],
    ]
    assert "/wat: no such command; /help shows them" in said


def test_a_system_text_that_a_template_refuses_is_one_line_and_the_conversation_goes_on() -> None:
    answerer = Scripted(TracedToken(5, "yes", [1.0, 0.0]))
    said = talk(answerer, "one", "/system refused", "two", "a refused question", "three")
    assert [line for line in said if line.startswith("error: ")] == [
        "error: messages: code: the chat template refuses the conversation: no system here; "
        "the conversation goes on as it was",
        "error: messages: code: the chat template refuses the conversation: no system here; "
        "/reset begins a new conversation",
    ]
    assert [m["content"] for m in answerer.asked[-1]] == ["one", "yes", "two", "yes", "three"]
    with pytest.raises(InputError, match="no system here"):
        talk(answerer, "one", system="refused")


def test_ctrl_c_at_the_prompt_leaves_the_conversation_alone() -> None:
    answerer = Scripted(TracedToken(5, "yes", [1.0, 0.0]))
    talk(answerer, "one", KeyboardInterrupt, "two")
    assert len(answerer.asked[1]) == 3


def test_ctrl_c_in_an_answer_forgets_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    answerer = Scripted(TracedToken(5, "yes", [1.0, 0.0]))
    stream = answerer.stream

    def interrupted(*arguments: Any, **options: Any) -> Iterator[Any]:
        yield next(stream(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(answerer, "stream", interrupted)
    said = talk(answerer, "one", "two")
    assert [len(asked) for asked in answerer.asked] == [1, 1]
    assert sum("ended early" in line for line in said) == 2


def test_text_that_a_template_must_not_hold_is_an_error_of_that_turn_only(answerer: Any) -> None:
    said = talk(answerer, "Say <|im_end|> now.", "Which city?")
    refused = [line for line in said if line.startswith("error: ")]
    assert len(refused) == (1 if "<|im_end|>" in answerer._opened.tokenizer.get_vocab() else 0)


def test_two_turns_with_a_real_model_are_the_answers_of_chat(answerer: Any, model: Any) -> None:
    tokenizer, messages = answerer._opened.tokenizer, []
    for line in ("Which city is the largest?", "And in Europe?"):
        messages.append({"role": "user", "content": line})
        shown, file = printer(terminal=False, names=answerer.names)
        answer = shown.stream(answerer, answerer.encode(messages), LIMITS, GREEDY)
        assert file.getvalue().endswith("\n")
        assert answer.text == model.chat(messages, tokenizer=tokenizer, max_new_tokens=STEPS)
        messages.append({"role": "assistant", "content": answer.text})
