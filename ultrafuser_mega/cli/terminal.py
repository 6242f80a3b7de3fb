"""Answers on a terminal: text as it comes, each token in the colour of the specialist that leads it; the chat prompt.

Where standard output is no terminal, the same text without colours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.answer import Answerer, Limits
from ultrafuser_mega.inference.batch import TraceFile
from ultrafuser_mega.inference.requests import Prompt
from ultrafuser_mega.inference.sampling import Sampling
from ultrafuser_mega.inference.text_engine import Answer
from ultrafuser_mega.reporting.palette import specialist_colors

_HELP = """/reset         forget the conversation, all but its system text
/system TEXT   begin again with this system text (none: without)
/help          this
/exit, /quit   leave, as Ctrl-D does; Ctrl-C ends an answer early
"""
_FEW_COLORS = ("blue", "yellow", "green", "magenta", "cyan", "red")  # as near to the palette as they come
# A model may write escape sequences; a terminal must not act on them.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class AnswerPrinter:
    """Prints answers of one model.

    Args:
        names: the specialists, in the order of gate weights.
        console: standard output unless told.
    """

    def __init__(self, names: Sequence[str], console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._styles = _styles(names, self._console.color_system)
        self._names = list(names)

    def stream(
        self, answerer: Answerer, prompt: Prompt, limits: Limits, sampling: Sampling, *, lead: bool = True
    ) -> Answer:
        """Print one answer as it comes; on a terminal a line of average gate weights follows it."""
        result: Answer | None = None
        for event in answerer.stream([prompt], limits, sampling, lead=lead):
            if isinstance(event, tuple):
                _, result = event
            else:
                leader = max(range(len(event.weights)), key=event.weights.__getitem__)
                self._print(event.text, self._styles[leader])
        assert result is not None
        self._console.print()
        if self._console.is_terminal:
            self._console.print(self.legend(result), style="dim")
        return result

    def legend(self, answer: Answer) -> Text:
        """The colours' names, each with its average weight."""
        line = Text()
        for name, style, weight in zip(self._names, self._styles, answer.mean_weights(), strict=True):
            line.append(f"■ {name} {weight:.0%}  ", style=style)
        return line.append(f"{len(answer.tokens)} tokens, {answer.finish_reason}")

    def _print(self, text: str, style: str) -> None:
        if self._console.is_terminal:
            self._console.print(Text(text.translate(_CONTROLS), style=style), end="", soft_wrap=True)
        else:  # rich would expand tabs
            self._console.file.write(text)
        self._console.file.flush()


def _styles(names: Sequence[str], color_system: str | None) -> list[str]:
    """A colour each; where a terminal has eight or sixteen, its own ones, because others would be rounded together."""
    if color_system in ("standard", "windows"):
        return [_FEW_COLORS[i % len(_FEW_COLORS)] for i in range(len(names))]
    return list(specialist_colors(names).values())


def chat(
    answerer: Answerer,
    printer: AnswerPrinter,
    traces: TraceFile,
    limits: Limits,
    sampling: Sampling,
    system: str | None,
    read: Callable[[str], str] = input,
    say: Callable[[str], None] = print,
) -> None:
    """Talk until Ctrl-D or /exit.

    Args:
        answerer, printer: of the model.
        traces: gets every answer.
        limits, sampling: of every answer.
        system: text that opens the conversation.
        read: prompt -> a line from the person; EOFError ends the conversation.
        say: for lines that are not answers.

    Raises:
        InputError: ``system`` is a text that a specialist's template does not take.
    """
    messages = _opening(answerer, system)
    answers = 0
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("\nCtrl-D or /exit leaves.")
            continue
        command, _, rest = line.partition(" ")
        if not line:
            continue
        if command in ("/exit", "/quit"):
            return
        if command in ("/reset", "/system"):
            wanted = rest.strip() or None if command == "/system" else system
            try:
                messages, system = _opening(answerer, wanted), wanted
                say("A new conversation.")
            except InputError as error:
                say(f"error: {error}; the conversation goes on as it was")
            continue
        if command.startswith("/"):
            say(_HELP if command == "/help" else f"{command}: no such command; /help shows them")
            continue
        try:
            asked = [*messages, {"role": "user", "content": line}]
            answer = printer.stream(answerer, answerer.encode(asked), limits, sampling)
        except InputError as error:
            say(f"error: {error}; /reset begins a new conversation")
            continue
        except KeyboardInterrupt:
            say("\n(ended early; the question and this answer are forgotten)")
            continue
        traces.write(answers, answer)
        answers += 1
        messages = [*asked, {"role": "assistant", "content": answer.text}]


def _opening(answerer: Answerer, system: str | None) -> list[dict[str, str]]:
    """A conversation's first messages; InputError where no question could follow, as after a refused system text."""
    if not system:
        return []
    opening = [{"role": "system", "content": system}]
    answerer.encode([*opening, {"role": "user", "content": "?"}])
    return opening
