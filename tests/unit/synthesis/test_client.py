"""What is asked again, what is not, what is paid and what is kept, over an endpoint that misbehaves."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.asking import Run, Wrong, calls, once
from support.counting_endpoint import Body, CountingEndpoint, chat

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.synthesis.budget import LimitReachedError
from ultrafuser_mega.synthesis.client import NO_ANSWER
from ultrafuser_mega.synthesis.forms import instruction_list
from ultrafuser_mega.synthesis.ledger import FILE
from ultrafuser_mega.synthesis.requests import BROKEN, CUT, EMPTY, GOOD, MALFORMED, REFUSED, Call


def first_number(wrong: Wrong) -> Callable[[Body], Wrong | None]:
    """The first seed of every question goes wrong, others do not."""
    met: dict[str, int] = {}

    def misbehave(body: Body) -> Wrong | None:
        seed = met.setdefault(body["messages"][0]["content"], body["seed"])
        return wrong if seed == body["seed"] else None

    return misbehave


QUICKLY = {"retry-after-ms": "5"}


@pytest.mark.parametrize("status", [429, 503, 529])
def test_a_request_that_is_turned_away_is_sent_again_and_costs_nothing(
    status: int, endpoint: CountingEndpoint, tmp_path: Path
) -> None:
    endpoint.misbehave = once((status, QUICKLY, '{"error": {"message": "slowly"}}'))
    run = Run(tmp_path, endpoint)
    answers = run.ask(calls(6))
    assert all(answer.value and not answer.faults for answer in answers)
    assert run.progress.total.turned_away == 6 and run.ledger.lost().requests == 0
    assert run.asker is not None and run.asker.budget.spent.requests == 6 == sum(endpoint.answered.values())


@pytest.mark.parametrize("status", [500, 502, 408])
def test_a_host_in_trouble_is_asked_again(status: int, endpoint: CountingEndpoint, tmp_path: Path) -> None:
    endpoint.misbehave = once((status, {}, "<html>oh</html>"))
    assert all(answer.value for answer in Run(tmp_path, endpoint).ask(calls(3)))


def test_a_connection_that_breaks_is_counted_as_paid_and_asked_again(
    endpoint: CountingEndpoint, tmp_path: Path
) -> None:
    endpoint.misbehave = once((0, {"reset": "yes"}, ""))
    run = Run(tmp_path, endpoint)
    assert all(answer.value for answer in run.ask(calls(3)))
    assert run.ledger.lost().requests == 3 and run.ledger.lost().cost > 0
    assert run.asker is not None and run.asker.budget.spent.requests == 6


@pytest.mark.parametrize(
    ("text", "fault", "counted"),
    [
        (json.dumps(chat("half a", 7, 64, "length")), CUT, True),
        (json.dumps(chat("", 7, 0)), EMPTY, True),
        (json.dumps(chat("  \n", 7, 2)), EMPTY, True),
        (json.dumps(chat("nothing to see", 7, 3, "content_filter")), REFUSED, True),
        (json.dumps({**chat("x"), "choices": []}), BROKEN, True),
        ('{"choices": [{"mess', BROKEN, False),
        ("<html>too busy</html>", BROKEN, False),
        (json.dumps({**chat("a reply"), "usage": None, "choices": [{"message": {"content": [1]}}]}), BROKEN, False),
    ],
)
def test_a_reply_that_cannot_be_used_is_kept_paid_for_and_asked_for_again(
    text: str, fault: str, counted: bool, endpoint: CountingEndpoint, tmp_path: Path
) -> None:
    endpoint.misbehave = first_number((200, {}, text))
    run = Run(tmp_path, endpoint)
    (answer,) = run.ask(calls(1))
    assert answer.value and answer.faults == (fault,)
    verdicts = {total.verdict: total for total in run.ledger.totals()}
    assert set(verdicts) == {fault, GOOD} and verdicts[fault].cost > 0
    assert (verdicts[fault].uncounted == 0) == counted
    (said,) = run.ledger.rows("select coalesce(raw, text) from call where verdict=?", (fault,))
    assert said[0] == (text if fault == BROKEN else json.loads(text)["choices"][0]["message"]["content"])


def test_after_the_last_attempt_the_call_comes_to_nothing_for_good(endpoint: CountingEndpoint, tmp_path: Path) -> None:
    endpoint.misbehave = lambda body: (200, {}, json.dumps(chat("cut", 5, 64, "length")))
    keys = {"steps__responses": {"model": "m", "max_tokens": 64, "retries": 2}}
    first = Run(tmp_path, endpoint, **keys).ask(calls(1))
    assert first[0].value is None and first[0].faults == (CUT,) * 3 and len(endpoint.seen) == 3
    assert Run(tmp_path, endpoint, **keys).ask(calls(1)) == first and len(endpoint.seen) == 3


def test_a_list_without_the_form_is_repaired_in_the_same_conversation(
    endpoint: CountingEndpoint, tmp_path: Path
) -> None:
    endpoint.misbehave = first_number((200, {}, json.dumps(chat("Certainly. What about?"))))
    run = Run(tmp_path, endpoint, models__m__json_schema=False)
    call = Call(
        "text", "instructions", ({"role": "user", "content": "Write 3 different instructions."},), instruction_list(3)
    )
    (answer,) = run.ask([call])
    assert len(answer.value) == 3 and answer.faults == (MALFORMED,)
    repair = endpoint.seen[-1]["messages"]
    assert [message["role"] for message in repair] == ["user", "assistant", "user"]
    assert repair[1]["content"] == "Certainly. What about?" and "three dashes" in repair[2]["content"]


def test_an_endpoint_without_schemas_is_found_out_once_and_asked_for_text(
    endpoint: CountingEndpoint, tmp_path: Path
) -> None:
    refusal: Wrong = (400, {}, '{"error": {"message": "response_format: no"}}')
    endpoint.misbehave = lambda body: refusal if "response_format" in body else None
    call = Call(
        "text", "instructions", ({"role": "user", "content": "Write 3 different instructions."},), instruction_list(3)
    )
    for _ in range(2):
        run = Run(tmp_path, endpoint)
        assert len(run.ask([call])[0].value) == 3
    assert sum("response_format" in body for body in endpoint.seen) == 1 and len(endpoint.seen) == 2


@pytest.mark.parametrize(
    ("status", "error", "told"),
    [
        (401, "wrong", r"endpoints.here: the key is refused \(Error code: 401 .*wrong"),
        (404, "no model played", r"endpoints.here: there is no such model or address \(.*no model played"),
        (
            429,
            "insufficient_quota",
            r"endpoints.here: .*insufficient_quota.*; the same command goes on once it is paid",
        ),
    ],
)
def test_what_waiting_does_not_mend_ends_the_run_in_one_line(
    status: int, error: str, told: str, endpoint: CountingEndpoint, tmp_path: Path
) -> None:
    endpoint.misbehave = lambda body: (status, {}, json.dumps({"error": {"message": error, "code": error}}))
    with pytest.raises(InputError, match=told) as caught:
        Run(tmp_path, endpoint).ask(calls(40))
    assert "\n" not in str(caught.value) and len(endpoint.seen) <= 8  # what was under way


def test_a_request_that_is_refused_for_itself_ends_itself_alone(endpoint: CountingEndpoint, tmp_path: Path) -> None:
    refusal: Wrong = (400, {}, '{"error": {"message": "too long", "code": "context_length_exceeded"}}')
    endpoint.misbehave = lambda body: refusal if body["messages"][0]["content"] == "question 1" else None
    answers = Run(tmp_path, endpoint).ask(calls(3))
    assert [answer.value for answer in answers] == [True, None, True]
    assert answers[1].faults == (REFUSED,) and len(endpoint.seen) == 3
    assert Run(tmp_path, endpoint).ask(calls(3)) == answers and len(endpoint.seen) == 3


def test_a_request_that_the_endpoint_cannot_read_is_told_and_asked_by_the_next_run(
    endpoint: CountingEndpoint, tmp_path: Path
) -> None:
    refusal: Wrong = (400, {}, '{"error": {"message": "what is that"}}')
    endpoint.misbehave = lambda body: refusal if body["messages"][0]["content"] == "question 1" else None
    (fault,) = Run(tmp_path, endpoint).ask(calls(3))[1].faults
    assert fault.startswith(NO_ANSWER) and "what is that" in fault
    endpoint.misbehave = lambda body: None
    assert all(answer.value for answer in Run(tmp_path, endpoint).ask(calls(3)))


@pytest.mark.parametrize("status", [200, 500])
def test_a_reply_without_end_is_let_go_of_and_costs_no_memory(
    status: int, endpoint: CountingEndpoint, tmp_path: Path
) -> None:
    endpoint.misbehave = once((status, {"again": "0"}, " " * 2**20))
    run = Run(tmp_path, endpoint)
    tracemalloc.start()
    answers = run.ask(calls(2))
    assert tracemalloc.get_traced_memory()[1] < 3 * 2 * 64 * 2**20  # of two replies, as parts and as a whole
    tracemalloc.stop()
    assert all(answer.value for answer in answers) and run.ledger.lost().requests == 2
    (reasons,) = zip(*run.ledger.rows("select distinct why from lost"), strict=True)
    assert all("a reply of more than 64 MiB" in reason for reason in reasons)


def test_a_reply_that_is_compressed_unasked_is_not_unpacked(endpoint: CountingEndpoint, tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(2**26)).decode("latin-1")
    endpoint.misbehave = once((200, {"Content-Encoding": "gzip"}, bomb))
    run = Run(tmp_path, endpoint)
    assert all(answer.value for answer in run.ask(calls(3))) and run.ledger.lost().requests == 3
    (row,) = run.ledger.rows("select distinct why from lost")
    assert "a reply in gzip, which was not asked for" in row[0]


def test_a_reply_that_comes_drop_by_drop_is_not_waited_for_without_end(
    endpoint: CountingEndpoint, tmp_path: Path
) -> None:
    endpoint.misbehave = once((200, {"again": "0.05"}, " "))
    run = Run(tmp_path, endpoint, endpoints__here__timeout_s=0.5)
    assert all(answer.value for answer in run.ask(calls(2))) and run.ledger.lost().requests == 2
    (row,) = run.ledger.rows("select distinct why from lost")
    assert row == ("no whole reply in 2 x endpoints.here.timeout_s",)


def test_an_endpoint_that_is_not_there_is_told_soon(endpoint: CountingEndpoint, tmp_path: Path) -> None:
    run = Run(tmp_path, endpoint, endpoints__here__url="http://127.0.0.1:9/v1")
    with pytest.raises(InputError, match=r"endpoints.here: the last 8 requests failed \(Connection error"):
        run.ask(calls(30))
    assert run.ledger.lost().requests == 0  # nothing ever left


def test_a_storm_ends_and_is_counted_to_the_token(endpoint: CountingEndpoint, tmp_path: Path) -> None:
    draw, bad = random.Random(7), {"read": 0, "written": 0, "replies": 0}

    def storm(body: Body) -> Wrong | None:
        chance = draw.random()
        if chance < 0.4:
            return 429, QUICKLY, '{"error": {"message": "slowly"}}'
        if chance < 0.5:
            bad["read"], bad["written"], bad["replies"] = bad["read"] + 5, bad["written"] + 3, bad["replies"] + 1
            return 200, {}, json.dumps(chat('{"items": ["Half an', 5, 3))
        return None

    endpoint.misbehave = storm
    run = Run(
        tmp_path,
        endpoint,
        steps__instructions={"model": "m", "max_tokens": 64, "per_call": 2, "retries": 8},
        models__m__json_schema=True,
    )
    wanted = [
        Call("text", "instructions", ({"role": "user", "content": f"q {place}"},), instruction_list(2))
        for place in range(60)
    ]
    answers = run.ask(wanted)
    assert all(len(answer.value) == 2 for answer in answers) and bad["replies"] > 0
    totals = run.ledger.totals()
    assert sum(total.read for total in totals) == endpoint.read + bad["read"]
    assert sum(total.written for total in totals) == endpoint.written + bad["written"]
    assert sum(len(answer.faults) for answer in answers) == bad["replies"]
    assert run.progress.total.turned_away > 0 and run.ledger.lost().requests == 0


@pytest.mark.parametrize("draw", [*range(6), *(pytest.param(draw, marks=pytest.mark.slow) for draw in range(6, 50))])
def test_no_limit_is_ever_passed(draw: int, endpoint: CountingEndpoint, tmp_path: Path) -> None:
    chance = random.Random(draw)
    limits: dict[str, float] = {
        "requests": chance.randrange(1, 12),
        "tokens": chance.randrange(400, 6000),
        "money": chance.uniform(6e-4, 2e-2),
    }
    limit = dict([chance.choice(list(limits.items()))])
    endpoint.misbehave = lambda body: (0, {"reset": "yes"}, "") if chance.random() < 0.1 else None
    run = Run(tmp_path, endpoint, limit=limit)
    try:
        finished = run.ask(calls(10))
    except LimitReachedError as reached:
        assert f"limit.{next(iter(limit))}=" in str(reached)
    else:
        assert len(finished) == 10
    asker = run.asker
    assert asker is not None and asker.budget.reserved.requests == 0
    spent: dict[str, float] = {"requests": len(endpoint.seen), "tokens": endpoint.read + endpoint.written}
    spent["money"] = (endpoint.read * 1.0 + endpoint.written * 10.0) / 1e6
    for name, value in limit.items():
        assert spent[name] <= value and getattr(asker.budget.spent, name) <= value


def test_a_higher_limit_goes_on_and_pays_nothing_twice(endpoint: CountingEndpoint, tmp_path: Path) -> None:
    with pytest.raises(LimitReachedError, match=r"limit.requests=4 is reached: 4 are used, and the next"):
        Run(tmp_path, endpoint, limit={"requests": 4}).ask(calls(10))
    assert len(endpoint.seen) == 4
    answers = Run(tmp_path, endpoint, limit={"requests": 10}).ask(calls(10))
    assert len(answers) == 10 and max(endpoint.answered.values()) == 1 and len(endpoint.seen) == 10


def test_the_key_is_sent_and_kept_nowhere(
    endpoint: CountingEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    endpoint.misbehave = once((500, {}, "no"))
    Run(tmp_path, endpoint, endpoints__here__key="MY_KEY").ask(calls(3))
    assert set(endpoint.keys) == {"Bearer sk-very-secret"}
    for path in tmp_path.iterdir():
        assert b"very-secret" not in path.read_bytes(), path
    assert (tmp_path / FILE).is_file()


def test_parameters_of_a_model_are_sent_whether_openai_knows_them_or_not(
    endpoint: CountingEndpoint, tmp_path: Path
) -> None:
    Run(tmp_path, endpoint, models__m__parameters={"top_k": 40, "frequency_penalty": 0.5}).ask(calls(1))
    (body,) = endpoint.seen
    assert (body["top_k"], body["frequency_penalty"], body["max_tokens"], body["temperature"]) == (40, 0.5, 64, 1.0)


def test_an_endpoint_with_a_key_of_its_own_does_not_get_openais(
    endpoint: CountingEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    Run(tmp_path, endpoint, endpoints__here__key="UNSET_KEY").ask(calls(2))
    assert set(endpoint.keys) == {"Bearer none"}


@pytest.mark.parametrize(("read", "written"), [(-1000, -1000), (5, 10**30), (True, True), (1.5, 2), ("5", "5")])
def test_a_usage_that_cannot_be_true_counts_as_the_most_it_can_have_been(
    read: Any, written: Any, endpoint: CountingEndpoint, tmp_path: Path
) -> None:
    endpoint.misbehave = lambda body: (200, {}, json.dumps(chat("Well.", read, written)))
    run = Run(tmp_path, endpoint)
    (answer,) = run.ask(calls(1))
    (total,) = run.ledger.totals()
    assert answer.value and total.uncounted == 1 and total.written == 64 and total.read > 0


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        (json.dumps(chat("half \ud83d of a pair")), GOOD),
        (json.dumps({**chat("Well."), "model": "half \udc00"}), GOOD),
        ("[" * 100_000, BROKEN),
        (json.dumps(chat("[" * 100_000)), GOOD),
    ],
)
def test_a_reply_that_no_file_can_hold_or_nobody_can_parse_ends_nothing(
    body: str, verdict: str, endpoint: CountingEndpoint, tmp_path: Path
) -> None:
    endpoint.misbehave = lambda _: (200, {}, body)
    run = Run(tmp_path, endpoint)
    run.ask(calls(1))
    assert {total.verdict for total in run.ledger.totals()} == {verdict}
    assert not any(
        "\ud800" <= sign <= "\udfff" for (text,) in run.ledger.rows("select text from call") for sign in text
    )


def test_what_an_endpoint_says_moves_no_cursor(endpoint: CountingEndpoint, tmp_path: Path) -> None:
    endpoint.misbehave = lambda body: (401, {}, '{"error": {"message": "no \\u001b[2J\\u0007 \\ud800 entry"}}')
    with pytest.raises(InputError, match="the key is refused") as caught:
        Run(tmp_path, endpoint).ask(calls(1))
    assert str(caught.value).isprintable()


def test_a_key_goes_without_the_end_of_its_line_and_is_never_shown(
    endpoint: CountingEndpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\r\n")
    assert Run(tmp_path, endpoint).ask(calls(1))[0].value
    assert endpoint.keys == ["Bearer sk-secret"]
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secr\u00e9t")
    with pytest.raises(InputError, match="OPENAI_API_KEY holds what is no printable ASCII") as caught:
        Run(tmp_path, endpoint).ask(calls(2))
    assert "sk-" not in str(caught.value)


def test_an_endpoint_that_is_not_there_is_told_with_the_systems_reason(tmp_path: Path) -> None:
    endpoint = CountingEndpoint()
    endpoint.close()
    run = Run(tmp_path, endpoint, endpoints__here__tries=1)
    (answer,) = run.ask(calls(1))
    assert "Connection error: " in answer.faults[0] and run.ledger.lost().requests == 0
