"""An evaluation's answers on disk: what is asked, what is kept, what an interrupted one asks again."""

from __future__ import annotations

import io
import json
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.evaluation.answering import answer_items
from ultrafuser_mega.evaluation.benchmark import Benchmark, Item, Score
from ultrafuser_mega.evaluation.contestants import Contestant, Messages, Reply
from ultrafuser_mega.evaluation.run import SETTINGS, Share, Task, run_evaluation, settings_of
from ultrafuser_mega.evaluation.samples import SAMPLES, gather_samples, read_samples


class Sums(Benchmark):
    name, title, domain, metric = "sums", "Sums", "math", "Acc"
    source, origin, max_new_tokens = "sums.jsonl", "nowhere", 8

    def items(self, data: Path) -> list[Item]:
        return [Item(str(n), (f"{n} + 1",), str(n + 1)) for n in range(6)]

    def score(self, item: Item, replies: Sequence[str]) -> Score:
        return Score(float(replies[0] == item.reference), replies[0], "whole")


class Adder:
    """Answers backwards, and is right about even numbers; fails where it is told to."""

    def __init__(self, fails_after: int | None = None) -> None:
        self.asked: list[str] = []
        self.fails_after = fails_after

    def answer(self, conversations: Sequence[Messages], max_new_tokens: int) -> Iterator[tuple[int, Reply]]:
        for number in reversed(range(len(conversations))):
            if self.fails_after is not None and len(self.asked) == self.fails_after:
                raise KeyboardInterrupt
            text = conversations[number][-1]["content"]
            self.asked.append(text)
            n = int(text.split()[0])
            yield number, Reply(str(n + 1 if n % 2 == 0 else 0), 2, "eos", {"text": 0.25, "math": 0.75})


def contestant(adder: Any, name: str = "adder", identity: str = "1") -> Contestant:
    @contextmanager
    def opened() -> Iterator[Any]:
        yield adder

    return Contestant(name, name, identity, opened)


@pytest.fixture
def evaluate(tmp_path: Path) -> Any:
    (tmp_path / "sums.jsonl").write_text("the data\n")
    out = tmp_path / "out"

    def call(*contestants: Contestant, seed: int = 0, items: int = 6, share: Share | None = None) -> Any:
        benchmark = Sums()
        tasks = [Task(benchmark, benchmark.items(tmp_path)[:items], 8)]
        settings = settings_of(contestants, tasks, tmp_path, seed, "bwrap", None)
        console = Console(file=io.StringIO())
        return run_evaluation(contestants, tasks, settings, out, share or Share(), console)

    call.out = out  # type: ignore[attr-defined]
    call.data = tmp_path  # type: ignore[attr-defined]
    return call


def test_every_item_has_a_line_with_what_was_asked_said_and_found(evaluate: Any) -> None:
    samples = evaluate(contestant(Adder()))
    assert samples == read_samples(evaluate.out / SAMPLES)
    assert {sample.item: sample.score for sample in samples} == {str(n): float(n % 2 == 0) for n in range(6)}
    first = next(sample for sample in samples if sample.item == "2")
    assert (first.turns, first.replies, first.extracted, first.rule) == (("2 + 1",), ("3",), "3", "whole")
    assert (first.tokens, first.finish, first.gate) == (2, ("eos",), {"text": 0.25, "math": 0.75})


def test_an_interrupted_evaluation_asks_only_what_has_no_answer(evaluate: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate(contestant(Adder(fails_after=2)))
    with (evaluate.out / SAMPLES).open("a") as file:
        file.write('{"model": "adder", "bench')  # the machine went down in the midst of a line
    again = Adder()
    samples = evaluate(contestant(again))
    assert again.asked == ["3 + 1", "2 + 1", "1 + 1", "0 + 1"]
    assert len(samples) == 6
    third = Adder()
    evaluate(contestant(third))
    assert third.asked == []


def test_models_and_items_can_be_added_to_a_folder(evaluate: Any) -> None:
    evaluate(contestant(Adder()), items=2)
    first, second = Adder(), Adder()
    samples = evaluate(contestant(first), contestant(second, "other"), items=3)
    assert (first.asked, second.asked) == (["2 + 1"], ["2 + 1", "1 + 1", "0 + 1"])
    assert len(samples) == 6
    assert set(json.loads((evaluate.out / SETTINGS).read_text())["models"]) == {"adder", "other"}


def test_a_folder_of_other_settings_is_refused_by_name(evaluate: Any) -> None:
    evaluate(contestant(Adder()))
    with pytest.raises(InputError, match=r"settings.json: seed was 0 for the answers that are there, now it is 1"):
        evaluate(contestant(Adder()), seed=1)
    with pytest.raises(InputError, match=r"models.adder was '1' for the answers that are there, now it is '2'"):
        evaluate(contestant(Adder(), identity="2"))
    (evaluate.data / "sums.jsonl").write_text("other data\n")
    with pytest.raises(InputError, match=r"benchmarks.sums.sha256 was"):
        evaluate(contestant(Adder()))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "no settings of an evaluation"),
        ("{}", "no settings of an evaluation"),
        ('{"models": {"adder": 1}, "benchmarks": {}}', "models.adder is 1"),
        ('{"models": {}, "benchmarks": []}', "no settings of an evaluation"),
    ],
)
def test_settings_that_are_none_are_refused(evaluate: Any, text: str, problem: str) -> None:
    evaluate.out.mkdir()
    (evaluate.out / SETTINGS).write_text(text)
    with pytest.raises(InputError, match=rf"settings.json: .*{problem}.*; choose another --out"):
        evaluate(contestant(Adder()))


class ThreadsStore:
    """What ranks share, for ranks that are threads."""

    def __init__(self) -> None:
        self._set: dict[str, threading.Event] = defaultdict(threading.Event)

    def set(self, key: str, value: str) -> None:
        self._set[key].set()

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        assert all(self._set[key].wait(60) for key in keys)


def test_ranks_share_the_items_and_their_answers_become_one_file(evaluate: Any) -> None:
    store, adders = ThreadsStore(), [Adder() for _ in range(3)]
    evaluate(contestant(Adder()), items=1)
    with ThreadPoolExecutor(3) as ranks:
        done = [ranks.submit(evaluate, contestant(adders[rank]), share=Share(rank, 3, store)) for rank in (2, 1, 0)]
        assert [len(one.result()) for one in done] == [0, 0, 6]
    assert [adder.asked for adder in adders] == [["4 + 1", "1 + 1"], ["5 + 1", "2 + 1"], ["3 + 1"]]
    assert [path.name for path in evaluate.out.glob("*.jsonl")] == [SAMPLES]


def test_a_damaged_line_in_the_middle_is_told(evaluate: Any) -> None:
    evaluate(contestant(Adder()))
    path = evaluate.out / SAMPLES
    lines = path.read_text().splitlines()
    for damaged in ("{", "[" * 100_000, "[1]"):
        path.write_text("\n".join([lines[0], damaged, *lines[1:]]) + "\n")
        with pytest.raises(InputError, match=r"samples.jsonl:2: damaged .*; remove the line to have it answered again"):
            gather_samples(evaluate.out)


class Chatty:
    def answer(self, conversations: Sequence[Messages], max_new_tokens: int) -> Iterator[tuple[int, Reply]]:
        for number, messages in enumerate(conversations):
            said = "" if number == 0 and len(messages) == 1 else f"{len(messages)} messages"
            yield number, Reply(said, 1 if len(messages) == 1 else 3, "eos", {"a": len(messages) / 4})

    def harness_model(self, benchmark: str) -> Any:
        raise NotImplementedError


class TwoTurns(Sums):
    def score(self, item: Item, replies: Sequence[str]) -> Score:
        return Score(None)


def test_a_second_turn_is_asked_behind_the_first_answer() -> None:
    items = [Item("x", ("one", "two"), None), Item("y", ("one",), None)]
    samples = {sample.item: sample for sample in answer_items("m", Chatty(), TwoTurns(), items, 8)}
    assert samples["x"].replies == ("", "3 messages") and samples["y"].replies == ("1 messages",)
    assert samples["x"].gate == {"a": (0.25 * 1 + 0.75 * 3) / 4} and samples["x"].tokens == 4
