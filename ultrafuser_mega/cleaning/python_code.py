"""Python in replies, and whether Python's own parser takes it."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator

_FENCE = re.compile(
    r"^[ \t]*(```+|~~~+)[ \t]*([\w+#.-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE
)
_NAMES = ("python", "py", "python3")
_ASKED_FOR = re.compile(r"\bpython\b", re.IGNORECASE)
_BEGINS = re.compile(r"(?:from|import|def|async def|class|@\w)\b")
_OTHERS = re.compile(
    r"[{;][^\S\n]*$|^[^\S\n]*(?:public|private|function|const|let|var|#include|package|use)\b", re.MULTILINE
)
_PROSE = re.compile(
    r"^(?:[A-Z][a-z']*|[A-Z]?[a-z']+)(?:,? [\w'\"`()./-]+){3,}.*$|^#{1,4} |^\*\*|^\d+\. |^- ", re.MULTILINE
)
_PROMPT = re.compile(r"^[^\S\n]*(?:>>>|In \[\d+\]:)", re.MULTILINE)
_FRAGMENT = re.compile(r"\s*(?:elif|else|except|finally|case)\b")
_MAGIC = re.compile(r"^[ \t]*[!%].*$", re.MULTILINE)
_MOST = 20_000  # characters: Python's parser survives whatever stands in so few


def unparsed(question: str, reply: str) -> str | None:
    """What Python says against the first program in a reply that it cannot parse; None: it parses all of them.

    A program is what is fenced as Python; without any fence a whole reply that begins as one, to a question that asks
    for Python. Prose behind that is cut off. What was typed into an interpreter, branches without their beginning and
    lines for a notebook are not looked at.
    """
    for program in _programs(question, reply):
        if _PROMPT.search(program) or _FRAGMENT.match(program) or len(program) > _MOST:
            continue
        source = _MAGIC.sub("", textwrap.dedent(program.expandtabs(8)))
        try:
            with warnings.catch_warnings():  # of odd escapes in strings, which are no errors yet
                warnings.simplefilter("ignore")
                ast.parse(source)
        except SyntaxError as error:
            line = (error.text or "").strip()
            return f"line {error.lineno}: {error.msg}: {line[:60]!r}"
        except (ValueError, RecursionError, MemoryError) as error:
            return f"{type(error).__name__}: {error}"
    return None


def _programs(question: str, reply: str) -> Iterator[str]:
    blocks = [(name.lower(), body) for _, name, body in _FENCE.findall(reply)]
    if blocks:
        yield from (body for name, body in blocks if name in _NAMES)
    elif _ASKED_FOR.search(question) and _BEGINS.match(text := reply.strip("\n")) and not _OTHERS.search(text):
        yield _code_of(text)


def _code_of(text: str) -> str:
    """The paragraphs up to the first that is prose."""
    paragraphs = re.split(r"(\n\s*\n)", text)
    for place in range(2, len(paragraphs), 2):
        first = paragraphs[place].splitlines()[0] if paragraphs[place] else ""
        if _PROSE.match(first) and not _BEGINS.match(first):
            return "".join(paragraphs[:place])
    return text
