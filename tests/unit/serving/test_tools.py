"""The tools that attack a server and compare what it says: they let a good one pass, and find what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from attack_server import CANARY, Attacker, attack
from compare_served import Said, compared, mixed, offline, served
from support.live_server import LiveServer

from ultrafuser_mega.inference.model import OpenedModel


def test_hostile_requests_leave_nothing_behind(computing: LiveServer, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("POST /v1/chat/completions 200")
    findings, left = attack(computing.url, 120, seed=5, log=tmp_path / "log")
    assert not findings.wrong
    assert sum(findings.seen.values()) >= 120 and {kind for kind, _ in findings.seen} > {"random_body", "torn_down"}
    assert not any(left["at rest"].values())


def test_an_unnamed_error_and_a_log_that_quotes_a_prompt_are_found(computing: LiveServer, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(f"asked: {CANARY}")
    assert attack(computing.url, 8, clients=2, log=tmp_path / "log")[0].wrong == [f"{tmp_path / 'log'} holds {CANARY}"]
    attacker = Attacker(computing.url, None, 0)
    attacker.note("large", b"HTTP/1.1 500 no\r\n\r\nInternal Server Error")
    attacker.note("large", b'HTTP/1.1 422 no\r\n\r\n{"detail": "bad"}')
    attacker.note(
        "large", b'HTTP/1.1 400 no\r\n\r\n{"error": {"message": "", "type": "", "param": null, "code": null}}'
    )
    assert [wrong.split()[2] for wrong in attacker.findings.wrong] == ["500", "422"]


def test_answers_over_http_are_compared_token_by_token(computing: LiveServer, opened: OpenedModel) -> None:
    bodies = mixed(12)
    wanted = offline(opened, bodies)
    found = []
    for body in bodies:
        status, said = served(computing.port, body)
        assert status == 200
        found.append(said)
    assert compared(bodies, wanted, found)["other"] == 0
    greedy = next(
        place for place, body in enumerate(bodies) if body["temperature"] == 0 and len(wanted[place].tokens) > 1
    )
    right = wanted[greedy]
    found[greedy] = Said(right.text, [right.tokens[0], "other", *right.tokens[2:]], [])
    (place,) = compared(bodies, wanted, found)["where"]
    assert place["request"] == greedy and place["token"] == 1
    assert place["nats between the likeliest"] == pytest.approx(right.gaps[1], abs=1e-5)
