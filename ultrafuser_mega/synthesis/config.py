"""What ``ultrafuser synthesize`` is told: endpoints, models, steps, classes, limits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from ultrafuser_mega.config.problems import first_problem
from ultrafuser_mega.config.section import Section
from ultrafuser_mega.openai_client import KEY

TOPICS, SUB_TOPICS, INSTRUCTIONS, RELATED = "meta_topics", "sub_topics", "instructions", "related"
COMPLICATED, RESPONSES, USER = "complicated", "responses", "user_turns"
STEPS = (TOPICS, SUB_TOPICS, INSTRUCTIONS, RELATED, COMPLICATED, RESPONSES, USER)
SHIPPED = ("general", "text", "code", "math")  # folders of prompts


class Endpoint(Section):
    """An address that speaks OpenAI's chat protocol."""

    url: str | None = Field(None, pattern=r"^https?://", description='as "https://host/v1"; null: OpenAI\'s')
    key: str = Field(KEY, pattern=r"^\w+$", description="the environment variable with the key; never the key itself")
    concurrency: PositiveInt = Field(32, description="most requests of one model under way; fewer where it is slowed")
    requests_per_minute: PositiveInt | None = None
    timeout_s: PositiveFloat = Field(300.0, description="of a silence; a whole reply may take twice as long")
    tries: PositiveInt = Field(8, description="of a request that the endpoint does not answer")

    @field_validator("url", mode="after")
    @classmethod
    def _with_a_host(cls, value: str | None) -> str | None:
        try:
            parts = urlsplit(value or "https://host")
            whole = bool((parts.hostname or "").strip()) and parts.port != 0
        except ValueError:
            whole = False
        if not whole:
            raise ValueError('is no address; write it as in "https://host/v1" or "http://127.0.0.1:8000/v1"')
        return value

    @field_validator("key", mode="after")
    @classmethod
    def _a_name(cls, value: str) -> str:
        if value.startswith(("sk_", "gsk_", "hf_", "AIza")) or len(value) > 60:
            raise ValueError("give the name of an environment variable, not a key")
        return value


class Price(Section):
    """Money per million tokens, in any one currency."""

    read: NonNegativeFloat
    written: NonNegativeFloat
    batch: float = Field(0.5, gt=0, le=1, description="what a batch costs of it")


class Model(Section):
    """A model behind an endpoint."""

    endpoint: str
    model: str = Field(min_length=1, description="as the endpoint knows it")
    price: Price | None = Field(None, description="without one, money is neither counted nor limited")
    json_schema: bool | None = Field(None, description="does it take response_format json_schema? null: asked once")
    seed: bool = Field(True, description="does it take seed? Then equal requests of different number differ")
    max_tokens_name: str = Field("max_tokens", pattern="^max_(completion_)?tokens$")
    tokens_per_gpu_s: PositiveFloat | None = Field(None, description="written, of a host of one's own: for --dry-run")
    parameters: dict[str, Any] = Field(default_factory=dict, description="of every request, as in {top_k: 40}")

    @field_validator("parameters")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        ours = {"model", "messages", "n", "stream", "response_format", "seed", "max_tokens", "max_completion_tokens"}
        if taken := (ours | {"temperature", "top_p"}) & set(value):
            raise ValueError(f"{min(taken)} is set by the steps or not supported; leave it out")
        try:
            json.dumps(value, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"cannot be sent as JSON ({error}); use texts, finite numbers, lists and keys") from None
        return value


class Step(Section):
    """How one step asks."""

    model: str
    temperature: float | None = Field(1.0, ge=0, le=2, description="null: the endpoint's own")
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: PositiveInt = Field(1024, lt=2**31, description="of a reply; a longer one is cut, and counts as none")
    per_call: PositiveInt = Field(10, description="topics or instructions that a request asks for")
    retries: NonNegativeInt = Field(3, description="times that a reply which cannot be used is asked for again")
    batch: bool = Field(False, description="by the endpoint's batch interface: half the price, within a day")
    expected_tokens: PositiveInt | None = Field(None, description="of a reply (an item, for lists): for --dry-run")


class Related(Section):
    """Instructions made from each one of the step before."""

    strong: NonNegativeInt = Field(1, description="close to it, of each")
    weak: NonNegativeInt = Field(1, description="in its surroundings, of each")

    @property
    def each(self) -> int:
        return self.strong + self.weak


class Turns(Section):
    """Conversations that go on behind the first response."""

    share: float = Field(0.0, ge=0, le=1, description="of conversations")
    most: PositiveInt = Field(2, description="user turns more")


class DataClass(Section):
    """One class of data."""

    domain: str = Field(min_length=1, description="what its topics are about, as prompts say it")
    topics: list[PositiveInt] | None = Field(
        None, min_length=1, description="how many in all, level by level: [21, 407] are meta-topics and sub-topics"
    )
    topics_file: Path | None = Field(None, description="topics made by hand instead, as topics.yaml has them")
    instructions: PositiveInt = Field(description="to be accepted, over all its sub-topics")
    related: Related = Related()
    complicated: float = Field(0.3, ge=0, le=1, description="share of instructions that is made more complex")
    turns: Turns = Turns()
    prompts: str = Field("general", description="general, text, code, math, or a folder of one's own")
    system: str | None = Field(None, description="system text of its conversations")
    steps: dict[str, dict[str, Any]] = Field(default_factory=dict, description="step -> keys other than in steps")

    @model_validator(mode="after")
    def _topics_of_one_kind(self) -> DataClass:
        if (self.topics is None) == (self.topics_file is None):
            raise ValueError("give either topics, as in [21, 407], or topics_file")
        if self.topics is not None and sorted(self.topics) != self.topics:
            raise ValueError(f"topics: {self.topics} has fewer topics at a lower level; every topic has at least one")
        return self


class Limit(Section):
    """What is never passed, over all that the ledger holds. A higher one goes on."""

    money: PositiveFloat | None = None
    tokens: PositiveInt | None = Field(None, description="read and written")
    requests: PositiveInt | None = None


class SynthesisConfig(Section):
    """A whole set of data."""

    name: str = Field("synthetic", max_length=100, description="of the data set")
    seed: NonNegativeInt = 0
    currency: str = Field("$", max_length=4)
    endpoints: dict[str, Endpoint] = Field(min_length=1)
    models: dict[str, Model] = Field(min_length=1)
    steps: dict[str, Step]
    classes: dict[str, DataClass] = Field(min_length=1)
    limit: Limit = Limit()
    near_duplicates: float | None = Field(
        0.7,
        gt=0,
        le=1,
        description="similarity from which an instruction repeats another; null: only the same words do",
    )
    least_words: PositiveInt = Field(3, description="of an instruction; a shorter one is left out, and made up for")
    rounds: PositiveInt = Field(20, description="most times that a class asks for what it still lacks")
    calls_per_round: PositiveInt = Field(
        8, description="requests of a sub-topic at once, which know nothing of each other; more for batches"
    )

    @field_validator("name", mode="after")
    @classmethod
    def _plain(cls, value: str) -> str:
        if not re.fullmatch(r"\w[\w .-]*", value):
            raise ValueError(f"{value!r} holds more than letters, digits, spaces, dots and dashes; leave the rest out")
        return value

    @model_validator(mode="after")
    def _names_are_known(self) -> SynthesisConfig:
        for name, model in self.models.items():
            _known(f"models.{name}.endpoint", model.endpoint, self.endpoints)
        for name in self.steps:
            _known(f"steps: {name}", name, STEPS)
        for name, data in self.classes.items():
            if not name.isidentifier():
                raise ValueError(f"{name!r} cannot name a class; use a plain word")
            for step in data.steps:
                _known(f"classes.{name}.steps: {step}", step, STEPS)
        for name in self.classes:
            for step in self.used(name):
                if step not in self.steps and step not in self.classes[name].steps:
                    raise ValueError(f"steps.{step} is missing, which class {name} needs; give it a model at least")
                try:
                    _known(f"steps.{step}.model", self.step(name, step).model, self.models)
                except ValidationError as error:
                    raise ValueError(f"classes.{name}.steps.{step}: {first_problem(error, Step)}") from None
        if self.limit.money is not None:
            free = [name for name, model in self.models.items() if model.price is None]
            if free:
                raise ValueError(f"limit.money needs models.{free[0]}.price; or limit tokens instead")
        return self

    def used(self, name: str) -> list[str]:
        """The steps that this class takes."""
        data = self.classes[name]
        levels = [] if data.topics is None else [TOPICS, SUB_TOPICS] if len(data.topics) > 1 else [TOPICS]
        wanted = [*levels, INSTRUCTIONS]
        wanted += [RELATED] if data.related.each else []
        wanted += [COMPLICATED] if data.complicated else []
        return [*wanted, RESPONSES, *([USER] if data.turns.share else [])]

    def step(self, name: str, step: str) -> Step:
        """How class ``name`` takes ``step``."""
        general = self.steps.get(step)
        own = self.classes[name].steps.get(step, {})
        return Step.model_validate({**(general.model_dump(exclude_unset=True) if general else {}), **own})


def _known(where: str, name: str, names: Any) -> None:
    if name not in names:
        raise ValueError(f"{where}: there is no {name!r}; use one of {', '.join(names)}")
