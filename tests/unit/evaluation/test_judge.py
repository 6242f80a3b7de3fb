"""Judges over a small server that plays the endpoint: both orders, garbage, retries, and nothing paid for twice."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from support.played_endpoint import Server, said

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.evaluation.benchmark import NO_VERDICT, Item, Sample
from ultrafuser_mega.evaluation.judge import (
    Endpoint,
    FileJudge,
    Ledger,
    Reply,
    Request,
    grade_chats,
    judge_pairs,
    open_judge,
    select_answers,
)
from ultrafuser_mega.evaluation.judge.verdicts import find_choice, find_rating, selection_prompt

QUICKLY = {"retry-after-ms": "1"}


@pytest.fixture
def judge(server: Server, tmp_path: Path) -> Iterator[Endpoint]:
    one = open_judge(f"openai:m@{server.url}", tmp_path / "judge.jsonl", prices=(1000.0, 10_000.0))
    assert isinstance(one, Endpoint)
    yield one
    one.ledger.close()


def sample(of: str, item: str, *replies: str) -> Sample:
    return Sample("fused", of, item, item, "", ("?",), replies, None, None, "", 3, ("eos",))


ALPACA = {f"a{n}": Item(f"a{n}", ("?",), {"instruction": f"Do {n} {{so}}.", "output": None}) for n in range(4)}
ANSWERS = [sample("alpacaeval", item, f"good {item}" if item == "a0" else f"bad {item}") for item in ALPACA]
OPPONENTS = {item: f"fair {item}" for item in ALPACA}


def ranking(body: dict[str, Any]) -> tuple[int, dict[str, str], str]:
    """Prefers good to fair to bad, but knows nothing of a2 and always takes a3's first."""
    text = body["messages"][-1]["content"]
    first, second = re.findall(r'"answer": """(\w+ \w+)"""', text)
    if "a2" in first:
        return said("I cannot say.")
    better = ("good", "fair", "bad")
    wins = "a3" in first or better.index(first.split()[0]) < better.index(second.split()[0])
    one, two = (1, 2) if wins else (2, 1)
    return said(f"[{{'model': 'model_1', 'rank': {one}}}, {{'model': 'model_2', 'rank': {two}}}]")


def test_pairs_are_shown_in_both_orders(server: Server, judge: Endpoint) -> None:
    server.answer = ranking
    judged = judge_pairs(judge, ANSWERS, ALPACA, OPPONENTS)
    assert [one.score for one in judged] == [1.0, 0.0, None, 0.5]
    assert [one.rule for one in judged] == ["1, swapped 2", "2, swapped 1", NO_VERDICT, "1, swapped 1"]
    assert [one.replies for one in judged] == [one.replies for one in ANSWERS]
    first = next(body for body in server.seen if "good a0" in str(body))
    assert first["model"] == "m" and first["temperature"] == 0.0 and first["max_tokens"] == 100
    assert [message["role"] for message in first["messages"]] == ["system", "user"]
    assert '    "instruction": """Do 0 {so}.""",\n}' in first["messages"][1]["content"]
    asked_again = [body["temperature"] for body in server.seen if "bad a2" in str(body)]
    assert sorted(asked_again) == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]


def test_an_answer_without_an_opponent_is_refused(judge: Endpoint) -> None:
    with pytest.raises(InputError, match="alpacaeval: nothing to compare a0 with; give the file's rows an output"):
        judge_pairs(judge, ANSWERS, ALPACA, {})


def test_one_and_the_same_reply_is_not_asked_about(server: Server, judge: Endpoint) -> None:
    same = replace(ANSWERS[0], model="base", replies=("fair a0",))
    server.answer = ranking
    judged = judge_pairs(judge, [same, ANSWERS[0]], ALPACA, OPPONENTS)
    assert [(one.model, one.score) for one in judged] == [("base", 0.5), ("fused", 1.0)] and len(server.seen) == 2


CHATS = {
    "m1": Item("m1", ("One?", "Two?"), None, category="writing"),
    "m2": Item("m2", ("Three?", "Four?"), ["3", "4"], category="math"),
}
CHATTED = [sample("mt_bench", item, f"first of {item}", f"second of {item}") for item in CHATS]


def test_both_turns_are_graded_with_a_reference_where_there_is_one(server: Server, judge: Endpoint) -> None:
    def grading(body: dict[str, Any]) -> tuple[int, dict[str, str], str]:
        second = "second" in body["messages"][1]["content"]
        return said("Rating: [[7.5]]" if second else "As [[rating]] I give [4]")

    server.answer = grading
    judged = grade_chats(judge, CHATTED, CHATS)
    assert [(one.score, one.extracted, one.rule) for one in judged] == [
        (0.575, "5.75", "turns 4.0 and 7.5"),
        (0.575, "5.75", "turns 4.0 and 7.5"),
    ]
    texts = sorted(body["messages"][1]["content"] for body in server.seen)
    assert len(texts) == 4 and sum("### Reference answer:\n4" in text for text in texts) == 1
    assert sum("[The Start of Reference Answer]\n3\n" in text for text in texts) == 1


def test_a_turn_without_a_grade_leaves_the_other(server: Server, judge: Endpoint) -> None:
    server.answer = lambda body: said("[[9]]" if "second" in body["messages"][1]["content"] else "[[11]]")
    (one,) = grade_chats(judge, CHATTED[:1], CHATS)
    assert (one.score, one.rule) == (0.9, f"turns {NO_VERDICT} and 9.0")


def test_nothing_is_paid_for_twice(server: Server, judge: Endpoint, tmp_path: Path) -> None:
    server.answer = ranking
    first = judge_pairs(judge, ANSWERS, ALPACA, OPPONENTS)
    asked = len(server.seen)
    assert asked == judge.spent.asked == 8 + 2 * 2
    assert judge.spent.cost == pytest.approx(asked * (100 * 1000 + 10 * 10_000) / 1e6)
    judge.ledger.close()
    again = open_judge(f"openai:m@{server.url}", tmp_path / "judge.jsonl")
    assert judge_pairs(again, ANSWERS, ALPACA, OPPONENTS) == first
    assert len(server.seen) == asked and (again.spent.asked, again.spent.kept) == (0, asked)
    assert again.spent.cost is None
    again.ledger.close()


def test_two_that_ask_the_same_are_asked_once(server: Server, judge: Endpoint) -> None:
    request = Request((("user", "x"),), {"temperature": 0.0})
    assert judge.replies([request, request]) == ["[[5]]", "[[5]]"] and len(server.seen) == 1


def test_what_may_pass_is_tried_again(server: Server, judge: Endpoint) -> None:
    problems = [
        (503, QUICKLY, "{}"),
        (429, QUICKLY, '{"error": {"message": "slow down"}}'),
        (200, {}, '{"choices": []}'),
    ]

    def failing(body: dict[str, Any]) -> tuple[int, dict[str, str], str]:
        return problems.pop(0) if problems else said("fine")

    server.answer = failing
    assert judge.replies([Request((("user", "x"),))]) == ["fine"] and len(server.seen) == 4


def test_a_refusal_ends_the_run_and_keeps_what_was_answered(server: Server, judge: Endpoint, tmp_path: Path) -> None:
    requests, turns = [Request((("user", f"question {n}"),)) for n in range(40)], count()

    def refusing(body: dict[str, Any]) -> tuple[int, dict[str, str], str]:
        return said("fine") if next(turns) < 10 else (401, {}, '{"error": {"message": "no\\nmoney left"}}')

    server.answer = refusing
    with pytest.raises(InputError, match=r"judge m@http.*401 - .*money left.*; replies so far are in .*judge.jsonl"):
        judge.replies(requests)
    assert len(judge.ledger.replies) == judge.spent.asked == 10
    server.answer = lambda body: said("fine")
    assert judge.replies(requests) == ["fine"] * 40
    judge.ledger.close()
    kept = Ledger(tmp_path / "judge.jsonl")
    assert len(kept.replies) == 40
    kept.close()


@pytest.mark.parametrize("text", ["no JSON", '{"choices": [{"message": {"content": null}}]}', "[]"])
def test_an_endpoint_that_talks_nonsense_is_told(text: str, server: Server, judge: Endpoint) -> None:
    server.answer = lambda body: (200, {}, text)
    with pytest.raises(InputError, match=r"^judge m@http.*(does not answer as OpenAI's chat|replies so far)"):
        judge.replies([Request((("user", "x"),))])


def test_an_endpoint_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai")
    from ultrafuser_mega import openai_client

    monkeypatch.setattr(openai_client, "_RETRIES", 0)
    one = open_judge("openai:m@http://127.0.0.1:9/v1", tmp_path / "judge.jsonl")
    with pytest.raises(InputError, match=r"^judge m@http://127.0.0.1:9/v1: Connection error"):
        one.replies([Request((("user", "x"),))])
    one.ledger.close()


def test_replies_made_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    one = open_judge(f"file:{path}", tmp_path / "unused.jsonl")
    assert isinstance(one, FileJudge)
    waiting = grade_chats(one, CHATTED, CHATS)
    assert [(sample.score, sample.rule) for sample in waiting] == [(None, "")] * 2
    lines = [json.loads(line) for line in one.requests.read_text().splitlines()]
    assert len(lines) == 4 and lines[0]["messages"][0]["role"] == "system" and lines[0]["reply"] is None
    one.ledger.close()
    answered = [json.dumps({"key": line["key"], "reply": f"[[{n + 6}]]"}) for n, line in enumerate(lines)]
    path.write_text("\n".join(answered[:3]))  # as an editor may leave it: without a last line's end
    partly = open_judge(f"file:{path}", tmp_path / "unused.jsonl")
    assert [sample.score for sample in grade_chats(partly, CHATTED, CHATS)] == [0.65, None]
    assert isinstance(partly, FileJudge)
    (missing,) = partly.requests.read_text().splitlines()
    assert json.loads(missing)["key"] == lines[3]["key"]
    partly.ledger.close()


def test_an_endpoints_ledger_can_be_judged_from(server: Server, judge: Endpoint, tmp_path: Path) -> None:
    judged = grade_chats(judge, CHATTED, CHATS)
    judge.ledger.close()
    one = open_judge(f"file:{tmp_path / 'judge.jsonl'}", tmp_path / "unused.jsonl")
    assert grade_chats(one, CHATTED, CHATS) == judged
    one.ledger.close()


def test_a_ledger_goes_on_behind_a_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    first, second = Request((("user", "x"),)), Request((("user", "y"),))
    ledger = Ledger(path)
    ledger.add(first, "m", Reply("one", 3, 1))
    ledger.add(second, "m", Reply("two"))
    ledger.close()
    path.write_bytes(path.read_bytes()[:-9])
    ledger = Ledger(path)
    assert ledger.replies == {first.key("m"): Reply("one", 3, 1)}
    ledger.add(second, "m", Reply("again"))
    ledger.close()
    ledger = Ledger(path)
    assert [reply.text for reply in ledger.replies.values()] == ["one", "again"] and ledger.models == {"m"}
    with pytest.raises(InputError, match="another run writes this ledger"):
        Ledger(path)
    ledger.close()


@pytest.mark.parametrize("text", ["no ledger", '{"key": "a", "reply": "x"}\nno ledger', "no\nledger"])
def test_a_file_that_is_read_only_to_be_judged_from_is_left_as_it_is(text: str, tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text(text)
    with contextlib.suppress(InputError):
        open_judge(f"file:{path}", tmp_path / "unused.jsonl").ledger.close()
    assert path.read_text() == text


def test_a_damaged_ledger_is_told_by_line(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text('{"key": "a", "reply": "x"}\n{"key": "b", "reply": null}\n')
    with pytest.raises(InputError, match=r"l.jsonl:2: is no line of a ledger \(.*reply is NoneType, not text"):
        Ledger(path)


def test_replies_of_two_models_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text('{"key": "a", "reply": "x", "model": "m"}\n{"key": "b", "reply": "y", "model": "n"}\n')
    with pytest.raises(InputError, match=r"replies of more than one model \(m, n\)"):
        open_judge(f"file:{path}", path)


@pytest.mark.parametrize("spec", ["gpt-4", "openai:", "file:", "openai:m@host:1", "x:y"])
def test_a_judge_of_another_form_is_refused(spec: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="write openai:MODEL, openai:MODEL@URL or file:PATH"):
        open_judge(spec, tmp_path / "l.jsonl")


def test_openai_without_a_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_ADMIN_KEY", raising=False)
    with pytest.raises(InputError, match=r"judge gpt-4o: .*; set OPENAI_API_KEY, or name an endpoint"):
        open_judge("openai:gpt-4o", tmp_path / "l.jsonl")


def test_the_best_answer_is_selected_whatever_its_place(server: Server, judge: Endpoint) -> None:
    models = ("text", "code", "math")
    items = [Item(f"i{n}", ("Ask", "Ask more"), None) for n in range(12)]
    replies = {model: {item.id: (f"{model} 1", f"{model} 2") for item in items} for model in models}

    def selecting(body: dict[str, Any]) -> tuple[int, dict[str, str], str]:
        text = body["messages"][0]["content"]
        shown = re.findall(r"set (\d)\]\n(\w+) 1\n", text)
        return said(f"Response set {next(number for number, model in shown if model == 'code')}")

    server.answer = selecting
    assert set(select_answers(judge, items, replies, seed=1).values()) == {"code"}
    orders = {tuple(re.findall(r"\](?:\n)(\w+) 1\n", body["messages"][0]["content"])) for body in server.seen}
    assert len(orders) > 1  # twelve items, six orders
    assert all(len(body["messages"]) == 1 for body in server.seen)


def test_the_selection_prompt_is_table_11() -> None:
    assert selection_prompt(["Q1", "Q2"], [["a", "b"], ["c", "d"], ["e", "f"]]) == (
        "You are a helpful assistant in selecting the best response set for the instruction below. The best response "
        "is the most helpful, honest, and harmless one. Note that there are two consecutive instructions and one "
        "response for each.\n[Start of instruction]\nQ1\nQ2\n[End of instruction]\nBelow are the three responses.\n"
        "[Start of response set 1]\na\nb\n[End of response set 1]\n[Start of response set 2]\nc\nd\n"
        "[End of response set 2]\n[Start of response set 3]\ne\nf\n[End of response set 3]\n"
        "Which response set is the best?\n"
        'Output "response set 1", "response set 2" or "response set 3" directly.'
    )


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Rating: [[8]]", 8.0),
        ("[[8.5]]", 8.5),
        ("Rating: [8]", 8.0),
        ("[[0]]", None),
        ("8", None),
        ("[[rating]]", None),
    ],
)
def test_ratings(reply: str, rating: float | None) -> None:
    assert find_rating(reply) == rating


def test_a_choice_names_one_set() -> None:
    assert [find_choice(text) for text in ("Response Set 2", "set 2", "response set 1 or response set 2")] == [
        2,
        None,
        None,
    ]
