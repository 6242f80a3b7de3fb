"""Conversations to each specialist's own token ids, exactly as the fused model was trained.

This file travels with the model; it imports nothing but torch and transformers. A specialist's sequence is

    [BOS] prompt_0  response_0 [EOS]  prompt_1  response_1 [EOS]  ...  prompt_last

with exactly one BOS. Prompts come from the specialist's template, rendered as text and encoded piece by piece: text
that continues a sequence is encoded behind an anchor whose ids are then cut off, so that tokenizers which put a space
before whatever they are given split it as they would in the middle of a text. Responses are encoded once and shared.

A template is a mapping, either of prompt pieces ``{"first": text, "later": text}`` around ``{instruction}``, or
``{"chat_template": Jinja text}``. In pieces, special-token texts are ordinary characters; with a Jinja template a
message that holds one is refused.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast as FastTokenizer

Messages = Sequence[Mapping[str, str]]  # [{"role": "user", "content": "..."}, ...]

_ANCHORS = ("\n", ":", "a", "0", ")")  # a line break first: few tokenizers let it melt into a word
_AFTER_EOS_PROBES = ("\nUser", "[INST] x", " x", "User")


class SpecialistEncoder:
    """One specialist's fast tokenizer and template."""

    def __init__(self, tokenizer: Any, template: Mapping[str, str]) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.renders_jinja = "chat_template" in template
        self._backend = tokenizer.backend_tokenizer
        self._later_anchors = self._find_later_anchors()

    def encode(self, system: str | None, users: Sequence[str], responses: Sequence[Sequence[int]]) -> list[int]:
        """The whole sequence up to where the next response begins.

        Args:
            system: system text or None.
            users: n user texts.
            responses: ids, EOS included, of the n - 1 responses between them.
        """
        texts = self._render(system, users)
        ids = self._first_prompt(texts[0])
        for response, text in zip(responses, texts[1:], strict=True):
            ids += [*response, *self._later_prompt(text)]
        return ids

    def encode_response(self, text: str, lead: str) -> list[int]:
        """Ids of a response, with EOS. ``lead`` stands before one that does not bring its own white space."""
        spaced = text if text[:1].isspace() else lead + text
        return [*self._encode_behind(spaced, _ANCHORS), self.tokenizer.eos_token_id]

    def _first_prompt(self, text: str) -> list[int]:
        ids, bos = self._ids(text, specials=self.renders_jinja), self.tokenizer.bos_token_id
        if bos is None:
            return ids
        start = next((place for place, token in enumerate(ids) if token != bos), len(ids))
        return [bos, *ids[start:]]

    def _later_prompt(self, text: str) -> list[int]:
        if not self.renders_jinja:
            return self._encode_behind(text, self._later_anchors)
        return self._after_eos(text)

    def _after_eos(self, text: str) -> list[int]:
        ids = self._ids(self.tokenizer.eos_token + text, specials=True)
        return ids[1:] if ids[:1] == [self.tokenizer.eos_token_id] else ids

    def _ids(self, text: str, *, specials: bool) -> list[int]:
        # The tokenizer sets all three again whenever it is called itself.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = not specials
        return self._backend.encode(text, add_special_tokens=False).ids

    def _encode_behind(self, text: str, anchors: Sequence[str]) -> list[int]:
        for anchor in anchors:
            prefix = self._ids(anchor, specials=False) if anchor else []
            ids = self._ids(anchor + text, specials=False)
            if ids[: len(prefix)] == prefix:
                return ids[len(prefix) :]
        return self._ids(text, specials=False)

    def _find_later_anchors(self) -> tuple[str, ...]:
        """The anchors behind which text is split as it is after EOS ("" for most tokenizers)."""
        expected = [self._after_eos(text) for text in _AFTER_EOS_PROBES]
        for anchor in ("", *_ANCHORS):
            if [self._encode_behind(text, (anchor,)) for text in _AFTER_EOS_PROBES] == expected:
                return (anchor, *_ANCHORS) if anchor else ("",)
        return ("",)

    def _render(self, system: str | None, users: Sequence[str]) -> list[str]:
        """One prompt text per user text."""
        if self.renders_jinja:
            return [prompt.removesuffix(" ") for prompt in self._render_jinja(system, users)]
        first = f"{system}\n\n{users[0]}" if system else users[0]
        filled = [self.template["first"].replace("{instruction}", first)]
        return filled + [self.template["later"].replace("{instruction}", user) for user in users[1:]]

    def _render_jinja(self, system: str | None, users: Sequence[str]) -> list[str]:
        """Rendered once with a marker as every response and cut there; EOS after a response belongs to it."""
        self._refuse_special_text([system or "", *users])
        marker = "xqResponseqx"
        while any(marker in text for text in (system or "", *users)):
            marker += "x"
        markers = [f"{marker}{place}z" for place in range(len(users))]
        messages = [{"role": "system", "content": system}] if system else []
        for user, mark in zip(users, markers, strict=True):
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": mark}]
        rest = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template["chat_template"], tokenize=False
        )
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        prompts: list[str] = []
        for mark in markers:
            prompt, found, rest = rest.partition(mark)
            if not found or mark in rest:
                raise ValueError("the chat template drops, repeats or reorders the responses of this conversation")
            if rest.lstrip(" ").startswith(eos):
                rest = rest.lstrip(" ").removeprefix(eos)
            opens_with_bos = bool(bos) and not prompts and prompt.startswith(bos)
            prompt = prompt.replace(bos, "") if bos else prompt
            prompts.append(bos + prompt if opens_with_bos else prompt)
        return prompts

    def _refuse_special_text(self, texts: Sequence[str]) -> None:
        specials = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        for text in texts if specials else ():
            if found := re.search("|".join(map(re.escape, specials)), text):
                raise ValueError(f"a message holds {found.group()}, which would be read as a control token")


def split_messages(messages: Messages) -> tuple[str | None, list[str], list[str]]:
    """``[{"role": ..., "content": ...}, ...]`` as system text, n user texts and the n - 1 responses between them.

    Raises ValueError where the roles are not an optional system, then user and assistant in turn, ending with user.
    """
    roles = [message["role"] for message in messages]
    opening = int(roles[:1] == ["system"])
    turns = roles[opening:]
    expected = ["user" if place % 2 == 0 else "assistant" for place in range(len(turns))]
    if len(turns) % 2 == 0 or turns != expected:
        raise ValueError(
            f"messages: the roles are {', '.join(roles) or 'none'}; "
            "expected an optional system, then user and assistant in turn, and user last"
        )
    contents = [message["content"] for message in messages]
    for content in contents:
        if not isinstance(content, str):
            raise ValueError(f"messages: content must be text, found {type(content).__name__}")
    return (contents[0] or None) if opening else None, contents[opening::2], contents[opening + 1 :: 2]


def encode_conversation(
    encoders: Mapping[str, SpecialistEncoder],
    messages: Messages,
    response_lead: str,
    vocab_size: int,
) -> dict[str, list[int]]:
    """name -> that specialist's ids up to where the next response begins; ValueError for a bad conversation."""
    system, users, answers = split_messages(messages)
    first = next(iter(encoders.values()))
    responses = [first.encode_response(answer, response_lead) for answer in answers]
    sequences = {name: encoder.encode(system, users, responses) for name, encoder in encoders.items()}
    for name, ids in sequences.items():
        if not ids:
            raise ValueError(f"messages: the prompt of {name} is empty")
        if max(ids) >= vocab_size:
            raise ValueError(f"messages: {name}'s prompt holds id {max(ids)}; the shared vocabulary has {vocab_size}")
    return sequences


def decode_response(tokenizer: Any, ids: Sequence[int], response_lead: str) -> str:
    """The text of generated ids, without special tokens and without the lead that every response began with."""
    # Decoded behind an anchor: some tokenizers drop the space before the first word of what they are given. No line
    # break, which may be a byte piece and then would be judged together with bytes that follow.
    anchor = tokenizer.backend_tokenizer.encode(":", add_special_tokens=False).ids
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text = tokenizer.decode([*anchor, *ids], **options).removeprefix(tokenizer.decode(anchor, **options))
    bare = text.removeprefix(response_lead)
    return text if bare[:1].isspace() else bare


class ChatMixin:
    """What a fused model does with conversations."""

    config: Any
    names: list[str]
    device: Any
    generate: Any

    def chat_inputs(self, conversations: Sequence[Messages], tokenizer: Any) -> dict[str, dict[str, Tensor]]:
        """What ``forward`` and ``generate`` take for a batch of conversations, each specialist's in its own template.

        Args:
            conversations: b lists of ``{"role": ..., "content": ...}``, each ending with a user message.
            tokenizer: the release folder's.

        Returns:
            ``specialist_input_ids`` and ``specialist_attention_mask``: name -> (b, s_j), padded on the left.

        Raises:
            ValueError: roles out of order, or text that the tokenizer would read as a control token.
        """
        device = "cpu" if self.device.type == "meta" else self.device  # accelerate has offloaded the first specialist
        rows = self.chat_ids(conversations, tokenizer)
        pad = self.config.pad_token_id  # within the shared vocabulary, which a tokenizer's own may not be
        ids, masks = {}, {}
        for name in self.names:
            longest = max(len(row[name]) for row in rows)
            padding = [longest - len(row[name]) for row in rows]
            padded = [[pad] * count + row[name] for count, row in zip(padding, rows, strict=True)]
            ids[name] = torch.tensor(padded, device=device)
            mask = [[0] * count + [1] * (longest - count) for count in padding]
            masks[name] = torch.tensor(mask, device=device)
        return {"specialist_input_ids": ids, "specialist_attention_mask": masks}

    def chat_ids(self, conversations: Sequence[Messages], tokenizer: Any) -> list[dict[str, list[int]]]:
        """What ``chat_inputs`` pads: of every conversation, name -> that specialist's ids."""
        encoders = {
            name: SpecialistEncoder(self._tokenizer_of(name, tokenizer), self.config.entry(name)["template"])
            for name in self.names
        }
        settings = self.config.response_lead, self.config.vocab_size
        return [encode_conversation(encoders, messages, *settings) for messages in conversations]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        *,
        tokenizer: Any,
        max_new_tokens: int = 512,
        **generate_kwargs: Any,
    ) -> str | list[str]:
        """The answer to a conversation; a list of answers to a list of conversations.

        Args:
            messages: ``[{"role": "user", "content": "..."}, ...]``, ending with a user message.
            tokenizer: the release folder's, from ``AutoTokenizer``.
            max_new_tokens: longest answer in tokens.
            generate_kwargs: as for ``generate``: ``do_sample``, ``temperature``, ``streamer``, ``stop_strings``, ...
        """
        batch: Any = messages
        single = not messages or isinstance(batch[0], Mapping)
        prompts = self.chat_inputs([batch] if single else batch, tokenizer)
        generate_kwargs |= {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True}
        sequences = self.generate(None, **prompts, tokenizer=tokenizer, **generate_kwargs).sequences
        prompt_length = prompts["specialist_input_ids"][self.names[0]].shape[1]
        lead = self.config.response_lead
        answers = [decode_response(tokenizer, ids, lead) for ids in sequences[:, prompt_length:].tolist()]
        return answers[0] if single and len(answers) == 1 else answers

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, and what of the folder it was loaded from a chat and a reader need."""
        parent: Any = super()
        parent.save_pretrained(save_directory, *args, **kwargs)
        source, target = Path(self.config.name_or_path or ""), Path(save_directory)
        for part in ("tokenizers", "chat_templates", "licenses"):
            if (source / part).is_dir() and source.resolve() != target.resolve():
                shutil.copytree(source / part, target / part, dirs_exist_ok=True)

    def _tokenizer_of(self, name: str, tokenizer: Any) -> Any:
        """``tokenizer``, or the specialist's own where the release keeps one for it."""
        subfolder = self.config.entry(name).get("tokenizer")
        if subfolder is None:
            return tokenizer
        loaded: dict[str, Any] = self.__dict__.setdefault("_own_tokenizers", {})
        if name not in loaded:
            source = self.config.name_or_path or ""
            if Path(source).is_dir() and not (Path(source) / subfolder).is_dir():
                raise ValueError(f"{source}: has no {subfolder}, {name}'s tokenizer; copy it from the release folder")
            loaded[name] = FastTokenizer.from_pretrained(source, subfolder=subfolder)
        return loaded[name]
