"""The model as clients see it: its name, prompts to ids and back, and what a body asks of the engine."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.model import OpenedModel
from ultrafuser_mega.inference.requests import Prompt, Request
from ultrafuser_mega.inference.sampling import Sampling
from ultrafuser_mega.release.chat_ultrafuser import SpecialistEncoder, encode_conversation
from ultrafuser_mega.serving.bodies import AnswerBody, ChatBody, CompletionBody, Message
from ultrafuser_mega.serving.errors import ApiError, bad_field
from ultrafuser_mega.serving.grammar import Vocabulary

_SHORT = 16  # tokens of a completion where a client names none, as OpenAI has it
_GREEDY = 1e-3  # temperatures below are as good as none


@dataclass(frozen=True)
class Wanted:
    """One answer that a body asks for.

    Attributes:
        request: for the engine.
        stop: strings that end it.
        lead: see :meth:`TextEngine.submit`.
        echo: the prompt as text, where it is to be in front of the answer.
    """

    request: Request
    stop: tuple[str, ...]
    lead: bool
    echo: str = ""


class Served:
    """What of the model the front needs. For one thread at a time, which is not the engine's.

    Args:
        opened: the model.
        name: that clients call it.
        room: specialist -> tokens that the engine has room for.

    Attributes:
        names: its specialists.
        vocabulary: its tokens.
    """

    def __init__(self, opened: OpenedModel, name: str, room: Mapping[str, int]) -> None:
        model, config = opened.model, opened.model.config
        self.name, self.names = name, list(model.names)
        # Tokenizers are changed by their use; the engine's thread has the original.
        self._tokenizer = copy.deepcopy(opened.tokenizer)
        self._encoders = {
            name: SpecialistEncoder(
                copy.deepcopy(model._tokenizer_of(name, opened.tokenizer)), config.entry(name)["template"]
            )
            for name in self.names
        }
        self._eos, self._lead = opened.eos, config.response_lead
        self._end: Any = config.eos_token_id
        self._rows = config.vocab_size
        self._letters = max(
            len(token) for encoder in self._encoders.values() for token in encoder.tokenizer.tokenizer.get_vocab()
        )
        self.vocabulary = Vocabulary(self._tokenizer, self._rows, opened.eos, config.response_lead)
        self.positions = {
            name: min(config.specialist_config(name).max_position_embeddings, room[name]) for name in self.names
        }

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer that every specialist takes."""
        return min(self.positions.values())

    def conversation(self, messages: Sequence[Message]) -> Prompt:
        """Each specialist's ids in its own template; ApiError where there are none."""
        told = [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": message.text(f"messages[{i}]"),
            }
            for i, message in enumerate(messages)
        ]
        for i, message in enumerate(told):
            if not message["content"].strip() and message["role"] != "system":
                raise bad_field(f"messages[{i}].content", "is empty; give some text")
        told = [message for message in told if message["content"].strip()]
        if len(told) > self.longest:  # each is a token at least, and templates take their time over thousands
            raise bad_field(
                "messages",
                f"{len(told)} messages; this model's maximum context length is {self.longest} tokens, with the answer",
                code="context_length_exceeded",
            )
        self._refuse_what_cannot_fit(sum(len(message["content"]) for message in told), "messages")
        try:
            return encode_conversation(self._encoders, told, self._lead, self._end, self._rows)
        except ValueError as error:
            raise bad_field("messages", str(error).removeprefix("messages: ")) from None

    def raw(self, text: str, param: str, specials: bool | None = None) -> list[int]:
        """Ids of a text that is continued as it stands; ``specials``: BOS in front, where the tokenizer has that.
        ApiError, which names ``param``, where it is too long for any answer."""
        self._refuse_what_cannot_fit(len(text), param)
        return self._tokenizer(text, add_special_tokens=specials is not False, verbose=False)["input_ids"]

    def text(self, ids: Sequence[int]) -> str:
        """What ids stand for, control tokens included."""
        self._check(ids, "tokens")
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def chat(self, body: ChatBody, id: str) -> list[Wanted]:
        """The answers that a conversation asks for."""
        return self._wanted(
            body,
            id,
            [self.conversation(body.messages)],
            "messages",
            longest=body.max_completion_tokens or body.max_tokens,
            logprobs=body.wanted_logprobs,
        )

    def completions(self, body: CompletionBody, id: str) -> list[Wanted]:
        """The answers that texts ask for; prompt by prompt, ``n`` of each."""
        prompts: list[Prompt] = []
        echoes: list[str] = []
        for place, given in enumerate(body.prompts):
            param = f"prompt[{place}]" if len(body.prompts) > 1 else "prompt"
            ids = self.raw(given, param, body.add_special_tokens) if isinstance(given, str) else given
            if not ids:
                raise bad_field(param, "is empty; give some text")
            self._check(ids, param)
            prompts.append(dict.fromkeys(self.names, ids))
            if body.echo:
                echoes.append(
                    given if isinstance(given, str) else self._tokenizer.decode(ids, skip_special_tokens=True)
                )
        return self._wanted(
            body,
            id,
            prompts,
            "prompt",
            longest=_SHORT if body.max_tokens is None else max(body.max_tokens, 1),
            logprobs=body.logprobs,
            prompt_logprobs=bool(body.echo) and body.logprobs is not None,
            echoes=echoes,
        )

    def _wanted(
        self,
        body: AnswerBody,
        id: str,
        prompts: Sequence[Prompt],
        param: str,
        *,
        longest: int | None,
        logprobs: int | None,
        prompt_logprobs: bool = False,
        echoes: Sequence[str] = (),
    ) -> list[Wanted]:
        sampling = self._sampling(body)
        grammar = self.vocabulary.grammar(body.response_format)
        wanted = []
        for place, prompt in enumerate(prompts):
            left = self._left(prompt, param)
            try:
                request = Request(
                    id="",
                    prompt=prompt,
                    sampling=sampling,
                    max_new_tokens=left if longest is None else min(longest, left),
                    eos=frozenset() if body.ignore_eos else self._eos,
                    top_logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
                )
            except InputError as error:
                raise bad_field(param, str(error)) from None
            for row in range(body.n or 1):
                own = replace(
                    request, id=f"{id}-{place}-{row}", row=row, constraint=self.vocabulary.constraint(grammar)
                )
                wanted.append(
                    Wanted(own, body.stops, lead=isinstance(body, ChatBody), echo=echoes[place] if echoes else "")
                )
        return wanted

    def _refuse_what_cannot_fit(self, letters: int, param: str) -> None:
        """Before tokenizers, which one thread has, take seconds over it: a token is no longer than the longest one."""
        if letters > self.longest * self._letters:
            raise bad_field(
                param,
                f"{letters:,} characters; this model's maximum context length is {self.longest} tokens, with the "
                f"answer, each of at most {self._letters} characters",
                code="context_length_exceeded",
            )

    def _left(self, prompt: Prompt, param: str) -> int:
        """Tokens that an answer may have behind a prompt."""
        name = min(self.names, key=lambda name: self.positions[name] - len(prompt[name]))
        left = self.positions[name] - len(prompt[name])
        if left < 1:
            raise bad_field(
                param,
                f"{len(prompt[name])} tokens for {name}; this model's maximum context length is {self.positions[name]} "
                "tokens, with the answer",
                code="context_length_exceeded",
            )
        return left

    def _sampling(self, body: AnswerBody) -> Sampling:
        bias: dict[int, float] = {}
        for token, value in (body.logit_bias or {}).items():
            if not (token.isascii() and token.isdigit() and len(token) < 12 and int(token) < self._rows):
                raise bad_field("logit_bias", f"{token[:20]!r} is no token; expected 0 to {self._rows - 1}")
            bias[int(token)] = value
        temperature = 1.0 if body.temperature is None else body.temperature
        try:
            return Sampling(
                temperature=temperature if temperature >= _GREEDY else 0.0,
                top_k=max(body.top_k or 0, 0),
                top_p=1.0 if body.top_p is None else max(body.top_p, 1e-6),
                min_p=body.min_p or 0.0,
                repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
                seed=secrets.randbits(32) if body.seed is None else body.seed,
                presence_penalty=body.presence_penalty or 0.0,
                frequency_penalty=body.frequency_penalty or 0.0,
                logit_bias=bias,
            )
        except InputError as error:
            raise ApiError(400, str(error)) from None

    def _check(self, ids: Sequence[int], param: str) -> None:
        if ids and max(ids) >= self._rows:
            raise bad_field(param, f"token {max(ids)}; the vocabulary has 0 to {self._rows - 1}")

    def describe(self, created: int) -> dict[str, Any]:
        """Of /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": created,
            "owned_by": "ultrafuser",
            "max_model_len": self.longest,
            "specialists": self.names,
        }
