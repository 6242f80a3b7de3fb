"""The templates a specialist may be configured with: the paper's table 9 and its own Hugging Face chat template.

What a template makes of a conversation is chat_format.py's subject. Here are their names, and what must be known of
all of them before a response can be shared (it is tokenised once for all specialists, see align.py):

    response_lead   white space between prompt and response that belongs to the response's first token
                    ("Assistant:" + " Paris"), as the template writes it where the response is history
    end_id          the token that the template writes behind a response: what is trained and what stops generation.
                    None: the template names none, and the tokenizer's EOS it is

A template has a ``name`` as configured and the ``text`` that defines it (for manifests).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ultrafuser_mega.data.chat_format import (
    Chat,
    JinjaTemplate,
    PieceTemplate,
    PromptError,
    SequenceTokenizer,
    check_markers,
    marked_messages,
    marker,
)
from ultrafuser_mega.errors import InputError


@dataclass(frozen=True, slots=True)
class PaperTemplate(PieceTemplate):
    """A template of table 9. ``{instruction}`` marks the user's text in ``first`` and ``later``."""

    name: str
    response_lead: str = " "
    end_id: int | None = None

    @property
    def text(self) -> str:
        return f"{self.first}\n---\n{self.later}"


# Table 9. It shows one turn; later turns take the same form here, WizardMath's preamble once. The "<s>"
# that it shows in front of CodeLlama's is the one BOS that every sequence has.
PAPER_TEMPLATES = {
    template.name: template
    for template in (
        PaperTemplate(
            "User: {instruction}\nAssistant:",
            "\nUser: {instruction}\nAssistant:",
            "ultralm",
        ),
        PaperTemplate(
            "[INST] {instruction} [/INST]",
            "[INST] {instruction} [/INST]",
            "codellama",
        ),
        PaperTemplate(
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\n{instruction}\n\n### Response:",
            "\n\n### Instruction:\n{instruction}\n\n### Response:",
            "wizardmath",
        ),
    )
}
TEMPLATE_NAMES = (*PAPER_TEMPLATES, "hf")


class ChatTemplate(JinjaTemplate):
    """The tokenizer's own chat template (``hf``), read from ``folder``."""

    name = "hf"

    def __init__(self, tokenizer: Any, folder: str) -> None:
        if not tokenizer.chat_template:
            raise InputError(
                f'{folder}: template "hf" asks for the tokenizer\'s chat template and it has none; '
                f"use one of {', '.join(PAPER_TEMPLATES)} or add chat_template.jinja"
            )
        try:
            super().__init__(str(tokenizer.get_chat_template()))
            self.response_lead, self.end_id = self._probe(SequenceTokenizer(tokenizer))
        except ValueError as error:  # PromptError, or several named templates and none called default
            raise InputError(f"{folder}: its chat template cannot be used: {error}") from None

    def _probe(self, tokenizer: SequenceTokenizer) -> tuple[str, int | None]:
        """``response_lead`` and ``end_id`` of what it makes of three questions and two answers, alone and together."""
        roles = ("user", "assistant", "user", "assistant", "user")
        messages = marked_messages(roles)
        first = self.apply(tokenizer, messages[:1])
        check_markers(first, roles[:1], among=("user",))
        history = self.apply(tokenizer, messages)
        check_markers(history, roles, among=("assistant",))
        before, _, behind = history.partition(marker(1))
        lead = " " if before == first + " " else ""
        opening = _added_tokens(tokenizer, first.partition(marker(0))[0])
        between = _added_tokens(tokenizer, behind.partition(marker(2))[0])
        ending = [
            *self._last_ending(tokenizer, messages[:4], opening),
            *(token for token in between if token not in opening),  # an opening ends nothing
        ]
        return lead, next(iter(ending), None)

    def _last_ending(
        self, tokenizer: SequenceTokenizer, messages: Sequence[Mapping[str, str]], opening: Sequence[int]
    ) -> list[int]:
        """Control tokens behind an answer that nothing follows.

        They may stand in ``opening``, what comes before a first question, as well: it holds the system text of a
        template that brings one along, which ends like a turn.
        """
        try:
            shown = self.apply(tokenizer, messages, for_generation=False)
            asks_anyway = shown == self.apply(tokenizer, messages)
        except PromptError:  # it wants a question at the end
            return []
        tokens = _added_tokens(tokenizer, shown.partition(marker(3))[2])
        return [token for token in tokens if not (asks_anyway and token in opening)]


def _added_tokens(tokenizer: SequenceTokenizer, text: str) -> list[int]:
    """The tokens in ``text`` that are no part of the trained vocabulary: control tokens, whether marked so or not."""
    added = {token for token, entry in tokenizer.tokenizer.added_tokens_decoder.items() if entry.content.strip()}
    return [token for token in tokenizer.encode([text], specials=True)[0] if token in added]


Template = PaperTemplate | ChatTemplate


def load_template(name: str, tokenizer: Any, folder: str) -> Template:
    """The template called ``name`` for a transformers tokenizer (read from ``folder``, for messages).

    Raises InputError for an unknown name and for a chat template that is missing, fails or loses texts.
    """
    if name in PAPER_TEMPLATES:
        return PAPER_TEMPLATES[name]
    if name == "hf":
        return ChatTemplate(tokenizer, folder)
    raise InputError(f'template "{name}" is not known; expected one of {", ".join(TEMPLATE_NAMES)}')


def other_than_own(template: Template, tokenizer: SequenceTokenizer, folder: str) -> bool:
    """Whether a template of the paper asks otherwise than the chat template that the folder brings along.

    White space and control tokens are left out: published chat templates differ from the paper's forms in those.
    """
    if isinstance(template, ChatTemplate) or not tokenizer.tokenizer.chat_template:
        return False
    chat = Chat(None, ["What is 2 + 3?"], [], [])
    try:
        asked = [t.prompt(tokenizer, chat) for t in (template, ChatTemplate(tokenizer.tokenizer, folder))]
    except (InputError, PromptError):
        return False
    ours, own = ("".join(tokenizer.tokenizer.decode(ids, skip_special_tokens=True).split()) for ids in asked)
    return ours != own


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """What the responses of all specialists have in common.

    lead      stands before each that does not bring its own white space: a space, if any template writes one
    end_id    stands behind each: what the first specialist's template ends a turn with
    ends      name -> what each one's template ends a turn with; any of them ends an answer
    """

    lead: str
    end_id: int
    ends: dict[str, int]


def response_format(
    tokenizers: Mapping[str, SequenceTokenizer], templates: Mapping[str, Template], vocab_size: int
) -> ResponseFormat:
    """That of these specialists; InputError where the ending lies beyond the shared vocabulary."""
    ends: dict[str, int] = {}
    for name, template in templates.items():
        ends[name] = tokenizers[name].eos_id if template.end_id is None else template.end_id
    first, end = next(iter(ends.items()))
    if end >= vocab_size:
        piece = tokenizers[first].tokenizer.convert_ids_to_tokens(end)
        raise InputError(
            f"specialists.{first}.template: its turns end with {piece} (id {end}), beyond the shared vocabulary of "
            f"{vocab_size}; use one of {', '.join(PAPER_TEMPLATES)}"
        )
    lead = " " if any(template.response_lead for template in templates.values()) else ""
    return ResponseFormat(lead, end, ends)
