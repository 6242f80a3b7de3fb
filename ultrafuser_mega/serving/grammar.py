"""Answers of a given form: a JSON schema becomes masks over the vocabulary, by llguidance; tokens' bytes as well."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
import torch
from torch import Tensor

from ultrafuser_mega.serving.bodies import ResponseFormat
from ultrafuser_mega.serving.errors import bad_field

# Between the parts of JSON: a small model that may write white space for ever does.
_WHITE = r"[ \n\t]{0,12}"
_LARGEST = 100_000  # characters of a schema


class Vocabulary:
    """What tokens are, byte for byte; what is made of it may be used in any thread.

    Args:
        tokenizer: of the model.
        rows: tokens that the model knows.
        ends: those that end an answer.
        lead: what answers begin with.
    """

    def __init__(self, tokenizer: Any, rows: int, ends: Collection[int], lead: str) -> None:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        largest = max((entry["id"] for entry in backend["added_tokens"]), default=0)
        known = max(rows, largest + 1, tokenizer.backend_tokenizer.get_vocab_size())
        self._tokens = llguidance.hf.from_tokenizer(tokenizer, n_vocab=known, eos_token=sorted(ends))
        self._ends, self._lead, self.rows = sorted(ends), lead, rows

    def bytes(self, token: int) -> bytes:
        """What a token adds to a text; of a special one, its name."""
        return self._tokens.decode_bytes([token])

    def text(self, token: int) -> str:
        """The same for people, as OpenAI writes it where it is a part of a character."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def special(self, token: int) -> bool:
        """Whether a token has a name and no text."""
        return self._tokens.is_special_token(token)

    def grammar(self, wanted: ResponseFormat | None) -> str | None:
        """The form of an answer, for ``constraint``; None: any.

        Raises:
            ApiError: a schema is missing, is none, or uses what cannot be held.
        """
        if wanted is None or wanted.type == "text":
            return None
        schema: Any = {"type": "object"}
        if wanted.type == "json_schema":
            if wanted.json_schema is None or wanted.json_schema.json_schema is None:
                raise bad_field("response_format.json_schema.schema", "missing; give the schema of the answer")
            schema = wanted.json_schema.json_schema
        if schema is True:
            schema = {}
        if isinstance(schema, dict):
            schema = {**schema, "x-guidance": {"whitespace_pattern": _WHITE}}
        text = json.dumps(schema)
        if len(text) > _LARGEST:
            raise bad_field("response_format", f"a schema of {len(text)} characters; expected {_LARGEST} or fewer")
        if problem := self._matcher(llguidance.grammar_from("json_schema", text)).get_error():
            raise bad_field("response_format", " ".join(problem.split("<state>")[0].split())[:300])
        lead = re.escape(self._lead).replace("/", r"\/")
        return llguidance.grammar_from("lark", f"start: /({lead})?/ answer\nanswer: %json {text}")

    def constraint(self, grammar: str | None) -> GrammarConstraint | None:
        """A new one for an answer that begins."""
        return None if grammar is None else GrammarConstraint(self._matcher(grammar), self._ends)

    def _matcher(self, grammar: str) -> llguidance.LLMatcher:
        return llguidance.LLMatcher(self._tokens, grammar, log_level=0)


class GrammarConstraint:
    """A :class:`~ultrafuser_mega.inference.requests.Constraint`; where its grammar is at its end, so is the answer."""

    def __init__(self, matcher: llguidance.LLMatcher, ends: list[int]) -> None:
        self._matcher, self._ends = matcher, ends

    def mask(self, scores: Tensor) -> None:
        """See :meth:`Constraint.mask`."""
        if self._matcher.is_stopped():  # complete, or too much for the matcher
            allowed = torch.zeros(scores.shape[0], dtype=torch.bool)
            allowed[self._ends] = True
        else:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: scores.shape[0]].astype(bool))
        scores.masked_fill_(~allowed.to(scores.device), -torch.inf)

    def accept(self, token: int) -> None:
        """See :meth:`Constraint.accept`."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
