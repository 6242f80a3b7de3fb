"""Conversations to each specialist's own token ids, exactly as the fused model was trained, and answers to text.

This file travels with the model; it imports nothing but torch and transformers. How one specialist's template makes
ids of a conversation is ``chat_format_ultrafuser``'s subject, which is the code that training used.

A template is a mapping, either of prompt pieces ``{"first": text, "later": text}`` around ``{instruction}``, or
``{"chat_template": Jinja text}``.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast as FastTokenizer

from .chat_format_ultrafuser import Chat, JinjaTemplate, Messages, PieceTemplate, SequenceTokenizer

PIPELINE = "pipeline_ultrafuser.py"


class SpecialistEncoder:
    """One specialist's fast tokenizer and template."""

    def __init__(self, tokenizer: Any, template: Mapping[str, str]) -> None:
        self.tokenizer = SequenceTokenizer(tokenizer)
        self.template: JinjaTemplate | PieceTemplate
        if "chat_template" in template:
            self.template = JinjaTemplate(template["chat_template"])
        else:
            self.template = PieceTemplate(template["first"], template["later"])

    def encode(self, chat: Chat) -> list[int]:
        """The ids of a conversation up to where the next response begins; ValueError where the template fails."""
        return self.template.prompt(self.tokenizer, chat)

    def encode_response(self, text: str, lead: str, end_id: int) -> list[int]:
        """Ids of a response, with ``end_id``. ``lead`` stands before one that does not bring its own white space."""
        return [*self.tokenizer.encode_responses([text], lead)[0], end_id]


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
    end_id: int,
    vocab_size: int,
) -> dict[str, list[int]]:
    """name -> that specialist's ids up to where the next response begins; ValueError for a bad conversation."""
    system, users, answers = split_messages(messages)
    first = next(iter(encoders.values()))
    responses = [first.encode_response(answer, response_lead, end_id) for answer in answers]
    chat = Chat(system, users, answers, responses)
    sequences: dict[str, list[int]] = {}
    for name, encoder in encoders.items():
        try:
            ids = sequences[name] = encoder.encode(chat)
        except ValueError as error:
            raise ValueError(f"messages: {name}: {error}") from None
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


def _holds(ids: Sequence[int], bos: int | None, begins: Sequence[int], ends: Sequence[int]) -> bool:
    """Whether ``ids`` are a conversation with these marks, behind any number of BOS, or begin with one."""
    start = next((place for place, token in enumerate(ids) if token != bos), 0)
    if list(ids[start : start + len(begins)]) != list(begins):
        return False
    places = range(start + len(begins), len(ids) - len(ends) + 1)
    return any(list(ids[place : place + len(ends)]) == list(ends) for place in places)


class ChatMixin:
    """What a fused model does with conversations."""

    config: Any
    names: list[str]
    device: Any
    generate: Any
    generation_config: Any
    _told_of_templates = False

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
        settings = self.config.response_lead, self.config.eos_token_id, self.config.vocab_size
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
        answers = []
        for ids in sequences[:, prompt_length:].tolist():
            end = next((place for place, token in enumerate(ids) if token in self._ends()), len(ids))
            answers.append(decode_response(tokenizer, ids[:end], self.config.response_lead))
        return answers[0] if single and len(answers) == 1 else answers

    def _tell_of_templates(self, ids: Tensor, mask: Tensor | None) -> None:  # both (b, s)
        """Warn, once, where all specialists read a conversation in the template of the first, as tools that apply a
        chat template and know nothing of specialists make it. Only the batch's first row is looked at."""
        marks = self.config.chat_marks
        if marks is None or self._told_of_templates or ids.is_meta or torch.compiler.is_compiling():
            return
        row = ids[0] if mask is None or mask.shape != ids.shape else ids[0][mask[0].bool()]
        if not _holds(row.tolist(), self.config.bos_token_id, marks["begins"], marks["ends"]):
            return
        self._told_of_templates = True
        template = self.config.entry(self.names[0])["template"]
        others = [name for name in self.names if self.config.entry(name)["template"] != template]
        warnings.warn(
            f"input_ids: a conversation in {self.names[0]}'s chat template, which all specialists read now; "
            f"{', '.join(others)} learnt another one and will answer worse. Each gets its own by "
            "model.chat(messages, tokenizer=tokenizer), by model.generate(**model.chat_inputs([messages], tokenizer)) "
            "and by pipeline('text-generation', FOLDER, trust_remote_code=True)",
            stacklevel=3,
        )

    def _ends(self) -> list[int]:
        """The tokens that end an answer; those of a chat template need not be marked as special ones."""
        ends = self.generation_config.eos_token_id
        return list(ends) if isinstance(ends, list) else [ends]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, and what of the folder it was loaded from a chat and a reader need."""
        parent: Any = super()
        parent.save_pretrained(save_directory, *args, **kwargs)
        source, target = Path(self.config.name_or_path or ""), Path(save_directory)
        if source.resolve() == target.resolve():
            return
        for part in ("tokenizers", "chat_templates", "licenses"):
            if (source / part).is_dir():
                shutil.copytree(source / part, target / part, dirs_exist_ok=True)
        if (source / PIPELINE).is_file():  # transformers copies the code of models alone
            shutil.copyfile(source / PIPELINE, target / PIPELINE)

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
