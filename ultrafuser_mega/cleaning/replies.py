"""What a reply shows by itself, however its question was put."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from ultrafuser_mega.cleaning.form import missing_form
from ultrafuser_mega.cleaning.language import foreign
from ultrafuser_mega.cleaning.python_code import unparsed
from ultrafuser_mega.cleaning.rules import Finding, Rules
from ultrafuser_mega.cleaning.words import words
from ultrafuser_mega.data.conversation import Conversation

_BEGINNING = 240  # characters in which a refusal shows
# Typed apostrophes are made straight before these are asked.
_CANNOT = r"(?:can(?:no|')?t|can not|could(?: not|n't)|(?:am|'m) (?:unable|not able)|won't be able|will not be able)"
_HELP = (
    r"(?:to )?(?:help|assist|provide|fulfil|comply|answer|generate|create|write|do (?:that|this|so)|complete|engage|"
    r"support|participate|process|perform|access|respond|give|offer|discuss|share|produce|continue)"
)
_REFUSAL = re.compile(
    r"\A\W*(?:(?:i'?m|i am) (?:very |really |truly )?sorry|i apologi[sz]e|sorry|unfortunately|my apologies)\b"
    rf"[^.!?\n]{{0,100}}\bi ?{_CANNOT}"
    rf"|\A\W*as an? [^.!?\n]{{0,40}}(?:ai\b|language model|assistant)[^.!?\n]{{0,80}}\bi ?(?:{_CANNOT}|do(?: not|n't))"
    rf"|\A\W*i ?{_CANNOT} {_HELP}",
    re.IGNORECASE,
)
_BOILERPLATE = re.compile(
    r"\bas an? (?:(?:ai|artificial intelligence|large|text-based|machine)[ -])?language model\b"
    r"|\bas an ai(?: assistant| model| chatbot)?,? i\b"
    r"|\bmy (?:knowledge cut-?off|training data)\b"
    r"|\bi(?: was|'?m| am| have been) (?:created|trained|developed|built) by (?:openai|anthropic|google|meta|laion)\b"
    r"|<\|(?:im_start|im_end|endoftext|eot_id|assistant|user|system|start_header_id|end_header_id)\|>"
    r"|\[/?INST\]|<</?SYS>>|</s>\s*\Z|^#{2,3} ?(?:instruction|response|input)s?:"
    r"|\[insert [^\]\n]{1,60}\]",
    re.IGNORECASE | re.MULTILINE,
)
# One of these stands in all that it finds; they are looked for first, since that takes a tenth of the time.
_BOILERPLATE_HAS = (
    *("language model", "as an ai", "my knowledge", "my training", " by openai", " by anthropic", " by google"),
    *(" by meta", " by laion", "<|", "inst]", "sys>>", "</s>", "[insert ", "##"),
)
_LONGEST_PERIOD = 60  # words
_ROUNDS = 4
_SHORTEST_LOOP = 24  # words


def find_in_replies(conversation: Conversation, rules: Rules) -> Finding | None:
    """The first rule that a trained reply breaks, and how; None: all of them are fine."""
    turns = [turn for place, turn in enumerate(conversation.turns) if place not in conversation.untrained]
    for name, find in FINDERS.items():
        if rules.asks(name):
            for question, reply in turns:
                if why := find(question, reply, rules):
                    return Finding(name, why)
    return None


def _length(question: str, reply: str, rules: Rules) -> str | None:
    count = len(words(reply))
    if rules.min_words <= count <= rules.max_words:
        return None
    return f"{count:,} words; {rules.min_words} to {rules.max_words:,} are asked for"


def _refusal(question: str, reply: str, rules: Rules) -> str | None:
    found = _REFUSAL.search(_straight(reply[:_BEGINNING]))
    return repr(" ".join(found[0].split())) if found else None


def _boilerplate(question: str, reply: str, rules: Rules) -> str | None:
    small = reply.lower()
    found = any(part in small for part in _BOILERPLATE_HAS) and _BOILERPLATE.search(_straight(reply))
    return repr(found[0].strip()) if found else None


def _straight(text: str) -> str:
    return text.replace("\u2019", "'")


def _repetition(question: str, reply: str, rules: Rules) -> str | None:
    found = words(reply)
    period, length = _loop(found)
    if not period:
        return None
    return f"ends in {length // period} rounds of {' '.join(found[-period:])[:80]!r}"


def _loop(found: Sequence[str]) -> tuple[int, int]:
    """(period, words) of what a text ends in again and again; zeros: it does not."""
    for period in range(1, min(_LONGEST_PERIOD, len(found) // _ROUNDS) + 1):
        length = period
        while length < len(found) and found[-1 - length] == found[-1 - length + period]:
            length += 1
        # A table of numbers is no loop.
        if length >= max(_ROUNDS * period, _SHORTEST_LOOP) and any(map(str.isalpha, found[-period:])):
            return period, length
    return 0, 0


def _language(question: str, reply: str, rules: Rules) -> str | None:
    return foreign(reply, rules.languages) if rules.languages else None


def _code(question: str, reply: str, rules: Rules) -> str | None:
    return unparsed(question, reply)


def _form(question: str, reply: str, rules: Rules) -> str | None:
    return missing_form(question, reply)


#: Rule -> (question, reply, rules) -> what it met, None: nothing.
FINDERS: Mapping[str, Callable[[str, str, Rules], str | None]] = MappingProxyType(
    {
        "length": _length,
        "refusal": _refusal,
        "boilerplate": _boilerplate,
        "repetition": _repetition,
        "language": _language,
        "code": _code,
        "form": _form,
    }
)
