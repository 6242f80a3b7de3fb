"""What one specialist reads before each response: the paper's table 9 and Hugging Face chat templates.

A template turns a conversation into one prompt text per turn: the first goes from the start of the
sequence to the first response, each later one from the end of a response to the next response. The
responses themselves are no business of a template: they are tokenised once for all specialists
(align.py), so a sequence is

    [BOS] prompt_0  response_0 [EOS]  prompt_1  response_1 [EOS]  ...

BOS and EOS are put there as ids by tokenizer.py and align.py, exactly one BOS whatever the template
writes. A chat template that opens with BOS keeps that text at the very start of its first prompt, since
some tokenizers split the next word differently after it; the id is counted once. A template that
repeats BOS before every turn (Llama-2 chat) loses the repetitions.

Where a template leaves a space between prompt and response, the space belongs to the response's first
token ("Assistant:" + " Paris"); ``response_lead`` says so and the prompt ends before the space.

A template has a ``name`` as configured, the ``text`` that defines it (for manifests), and
``writes_special_tokens``: whether special-token texts in its prompts mean the tokens. Where they do not,
"<s>" typed by a user stays four characters; where they do, such a conversation is refused.

System text: table 9 has no place for it, so it is put before the first instruction with a blank line
between them; a chat template puts it where its author wanted it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from ultrafuser_mega.data.conversation import Conversation
from ultrafuser_mega.errors import InputError


class UnfitConversationError(ValueError):
    """This template cannot render this conversation; the message is the reason."""


@dataclass(frozen=True, slots=True)
class PaperTemplate:
    """A template of table 9. ``{instruction}`` marks the user's text in ``first`` and ``later``."""

    name: str
    first: str
    later: str
    response_lead: str = " "
    writes_special_tokens: bool = False

    @property
    def text(self) -> str:
        return f"{self.first}\n---\n{self.later}"

    def prompts(self, conversation: Conversation) -> list[str]:
        """One text per turn. The responses are not read."""
        (user, _), *rest = conversation.turns
        if conversation.system:
            user = f"{conversation.system}\n\n{user}"
        filled = [self.first.replace("{instruction}", user)]
        return filled + [self.later.replace("{instruction}", user) for user, _ in rest]


# Table 9. It shows one turn; later turns take the same form here, WizardMath's preamble once. The "<s>"
# that it shows in front of CodeLlama's is the one BOS that every sequence has.
PAPER_TEMPLATES = {
    template.name: template
    for template in (
        PaperTemplate(
            "ultralm",
            "User: {instruction}\nAssistant:",
            "\nUser: {instruction}\nAssistant:",
        ),
        PaperTemplate(
            "codellama",
            "[INST] {instruction} [/INST]",
            "[INST] {instruction} [/INST]",
        ),
        PaperTemplate(
            "wizardmath",
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\n{instruction}\n\n### Response:",
            "\n\n### Instruction:\n{instruction}\n\n### Response:",
        ),
    )
}
TEMPLATE_NAMES = (*PAPER_TEMPLATES, "hf")


class ChatTemplate:
    """The tokenizer's own chat template (``hf``).

    The whole conversation is rendered once with a unique marker as every assistant's content and cut at
    the markers, so what the template says between two responses is exactly its author's. EOS text right
    after a marker is taken away: EOS belongs to the response.
    """

    name = "hf"
    writes_special_tokens = True

    def __init__(self, tokenizer: Any, folder: str) -> None:
        self.tokenizer = tokenizer
        self.folder = folder
        if not tokenizer.chat_template:
            raise InputError(
                f'{folder}: template "hf" asks for the tokenizer\'s chat template and it has none; '
                f"use one of {', '.join(PAPER_TEMPLATES)} or add chat_template.jinja"
            )
        probe = Conversation((("one", ""), ("two", "")))
        try:
            self.text = str(tokenizer.get_chat_template())
            rendered = self._render(probe)
        except ValueError as error:  # UnfitConversationError, or several named templates and none called default
            raise InputError(f"{folder}: its chat template cannot be used: {error}") from None
        self.response_lead = " " if all(prompt.endswith(" ") for prompt in rendered) else ""
        texts = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(map(re.escape, texts))) if texts else None

    def prompts(self, conversation: Conversation) -> list[str]:
        """One text per turn. The responses are not read. Raises UnfitConversationError."""
        self._refuse_special_text(conversation)
        return [prompt.removesuffix(" ") for prompt in self._render(conversation)]

    def _render(self, conversation: Conversation) -> list[str]:
        """The texts before each marker; a space at their end is kept, EOS after a response is not."""
        marker = "xqResponseqx"
        while any(marker in user for user, _ in conversation.turns) or marker in (conversation.system or ""):
            marker += "x"
        markers = [f"{marker}{place}z" for place in range(len(conversation.turns))]
        messages = [{"role": "system", "content": conversation.system}] if conversation.system else []
        for (user, _), mark in zip(conversation.turns, markers, strict=True):
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": mark}]
        try:
            rest = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:
            reason = str(error).split("\n")[0]
            raise UnfitConversationError(f"the chat template refuses the conversation: {reason}") from None
        if any(rest.count(mark) != 1 for mark in markers):
            raise UnfitConversationError("the chat template drops, repeats or alters the response")
        prompts: list[str] = []
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        for mark in markers:
            prompt, found, rest = rest.partition(mark)
            if not found:
                raise UnfitConversationError("the chat template changes the order of the responses")
            if rest.lstrip(" ").startswith(eos):
                rest = rest.lstrip(" ").removeprefix(eos)
            opens_with_bos = bool(bos) and not prompts and prompt.startswith(bos)
            prompt = prompt.replace(bos, "") if bos else prompt
            prompts.append(bos + prompt if opens_with_bos else prompt)
        return prompts

    def _refuse_special_text(self, conversation: Conversation) -> None:
        if self._special is None:
            return
        for text in (conversation.system or "", *(user for user, _ in conversation.turns)):
            if found := self._special.search(text):
                raise UnfitConversationError(
                    f"the user's text holds {found.group()}, which would be read as a control token"
                )


Template = PaperTemplate | ChatTemplate


def load_template(name: str, tokenizer: Any, folder: str) -> Template:
    """The template called ``name`` for a transformers tokenizer (read from ``folder``, for messages).

    Raises InputError for an unknown name and for a chat template that is missing or loses responses.
    """
    if name in PAPER_TEMPLATES:
        return PAPER_TEMPLATES[name]
    if name == "hf":
        return ChatTemplate(tokenizer, folder)
    raise InputError(f'template "{name}" is not known; expected one of {", ".join(TEMPLATE_NAMES)}')
