"""What clients send, field by field; a field that is unknown is ignored, one that is known and not offered refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ultrafuser_mega.serving.errors import ApiError, bad_field

MOST_CHOICES = 128
_NOTHING: tuple[Any, ...] = (None, False, "", [], {})
# Known and not offered: name -> values, beside those that say nothing, under which the answer is the same.
_NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "tools": (),
    "tool_choice": ("none", "auto"),
    "functions": (),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "suffix": (),
    "best_of": (1,),
    "use_beam_search": (),
    "stop_token_ids": (),
    "min_tokens": (0,),
    "continue_final_message": (),
}

Text = Annotated[str, Field(min_length=1)]
Ids = list[Annotated[int, Field(ge=0, lt=2**31)]]


class Body(BaseModel):
    """Of any request."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str | None = None


class TextPart(BaseModel):
    """A piece of a message."""

    type: str
    text: str | None = None


class Message(BaseModel):
    """One of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def text(self, place: str) -> str:
        """Its text; ApiError where a part of it is none."""
        if isinstance(self.content, str):
            return self.content
        texts = []
        for number, part in enumerate(self.content):
            if part.type != "text" or part.text is None:
                raise bad_field(
                    f"{place}.content[{number}]", f"expected a text, found {part.type!r}; the model reads text"
                )
            texts.append(part.text)
        return "".join(texts)


class StreamOptions(BaseModel):
    """What a stream has beside the answer."""

    include_usage: bool | None = None


class JsonSchema(BaseModel):
    """The schema of an answer."""

    name: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")


class ResponseFormat(BaseModel):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class AnswerBody(Body):
    """Of a request for answers. Null is as good as left out.

    ``gate_weights`` is this server's own: the answer then says which specialist chose which token.
    """

    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    gate_weights: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_offered(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name, harmless in _NOT_OFFERED.items():
                value = values.get(name)
                if value not in _NOTHING and value not in harmless:
                    raise ApiError(
                        400,
                        f"{name}: not offered by this server; leave it out",
                        param=name,
                        code="unsupported_parameter",
                    )
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise bad_field("stream_options", "only with stream = true")
        if self.ignore_eos and self.response_format is not None and self.response_format.type != "text":
            raise bad_field("ignore_eos", "an answer in a response_format ends where it is complete")
        return self

    @property
    def answers(self) -> int:
        """How many it asks for."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(AnswerBody):
    """Of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_field("top_logprobs", "only with logprobs = true")
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        """As :class:`Request` has it."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(AnswerBody):
    """Of /v1/completions."""

    prompt: str | Ids | Annotated[list[str], Field(max_length=2048)] | Annotated[list[Ids], Field(max_length=2048)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise bad_field("max_tokens", "0 is for echo = true; expected 1 or more")
        return self

    @property
    def answers(self) -> int:
        """How many it asks for."""
        return len(self.prompts) * (self.n or 1)

    @property
    def prompts(self) -> list[Any]:
        """Texts, or lists of ids; one or many."""
        given: Any = self.prompt
        many = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
        return given if many else [given]


class TokenizeBody(Body):
    """Of /tokenize: a text, or a conversation as each specialist gets it."""

    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise bad_field("prompt", "give it or messages, and not both")
        return self


class DetokenizeBody(Body):
    """Of /detokenize."""

    tokens: Ids
