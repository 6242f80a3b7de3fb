"""kill -9 at any moment: the next run asks what was in flight and nothing else, and ends with the same files."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.counting_endpoint import CountingEndpoint
from support.small_synthesis import config_text

IN_FLIGHT = 8  # the test configuration's concurrency


def start(endpoint: CountingEndpoint, folder: Path, **keys: Any) -> subprocess.Popen[str]:
    """``ultrafuser synthesize`` in a process of its own."""
    folder.parent.mkdir(exist_ok=True)
    config = folder.with_suffix(".yaml")
    config.write_text(config_text(endpoint.url, **keys))
    command = [sys.executable, "-m", "ultrafuser_mega", "synthesize", "--config", str(config), "--out", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text
    return text


def kill(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)


def digests(folder: Path) -> dict[str, str]:
    """Of all that a run leaves, but its ledger and the configuration, which names the endpoint's port."""
    left = [path for path in folder.rglob("*") if path.is_file() and path.name != "config.yaml"]
    files = [path for path in left if not path.name.startswith("ledger")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def killed_often(
    kills: int, endpoint: CountingEndpoint, folder: Path, seed: int, **keys: Any
) -> tuple[dict[str, str], dict[str, str], int]:
    """Digests of an undisturbed run and of one that is killed ``kills`` times, and the requests it takes."""
    calm = CountingEndpoint()
    try:
        finish(start(calm, folder / "calm", **keys))
        needed = sum(calm.answered.values())
        assert max(calm.answered.values()) == 1
    finally:
        calm.close()
    draw = random.Random(seed)
    for moment in sorted(draw.uniform(0, 0.97) for _ in range(kills)):
        process = start(endpoint, folder / "killed", **keys)
        deadline = time.monotonic() + 100
        while len(endpoint.answered) < moment * needed and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        kill(process)
    text = finish(start(endpoint, folder / "killed", **keys))
    assert "rows" in text
    asked = sum(endpoint.answered.values())
    finish(start(endpoint, folder / "killed", **keys))  # and once more: nothing is asked
    assert sum(endpoint.answered.values()) == asked
    assert len(endpoint.answered) == needed
    return digests(folder / "calm"), digests(folder / "killed"), needed


@pytest.fixture
def slow_endpoint() -> Any:
    pytest.importorskip("openai")
    one = CountingEndpoint(seconds=0.02)
    yield one
    one.close()


@pytest.mark.timeout(300)
def test_a_killed_run_pays_twice_for_no_more_than_was_under_way(
    slow_endpoint: CountingEndpoint, tmp_path: Path
) -> None:
    calm, killed, needed = killed_often(1, slow_endpoint, tmp_path, seed=1)
    assert killed == calm and len(calm) >= 6
    assert 0 <= sum(slow_endpoint.answered.values()) - needed <= IN_FLIGHT


_ENDED_BY_WRITING = """
import os, signal, sys
from pathlib import Path
from ultrafuser_mega import __main__ as program

left = int(sys.argv.pop(1))

def watch(event, arguments):
    global left
    if event in ("open", "os.rename") and ".tmp" in str(arguments[0]) and "/left/" in str(arguments[0]):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
sys.exit(program.main())
"""


@pytest.mark.timeout(300)
def test_a_run_that_is_killed_while_it_writes_its_files_leaves_no_half_of_one(
    endpoint: CountingEndpoint, tmp_path: Path
) -> None:
    finish(start(endpoint, tmp_path / "left"))
    whole = digests(tmp_path / "left")
    asked = len(endpoint.seen)
    words = ["synthesize", "--config", str(tmp_path / "left.yaml"), "--out", str(tmp_path / "left")]
    moment = met = 0
    while True:
        for path in (tmp_path / "left").rglob("*"):
            if path.is_file() and not path.name.startswith("ledger"):
                path.unlink()
        command = [sys.executable, "-c", _ENDED_BY_WRITING, str(moment), *words]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
        found = {name: digest for name, digest in digests(tmp_path / "left").items() if not name.endswith(".tmp")}
        assert found.items() <= whole.items()
        if ended.returncode != -signal.SIGKILL:
            break
        met += 1
        moment += 6
    assert ended.returncode == 0, ended.stderr
    assert met >= 4 and digests(tmp_path / "left") == whole and len(endpoint.seen) == asked


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2])
def test_twenty_kills_of_four_hundred_requests(seed: int, slow_endpoint: CountingEndpoint, tmp_path: Path) -> None:
    many = {"classes__text__instructions": 130, "classes__code__instructions": 130, "classes__text__topics": [3, 9]}
    turns = {"classes__code__turns": {"share": 0.2, "most": 1}}
    calm, killed, needed = killed_often(20, slow_endpoint, tmp_path, seed, **many, **turns)
    twice = sum(slow_endpoint.answered.values()) - needed
    print(f"{needed} requests, {twice} paid twice in 20 kills")
    assert needed >= 400 and killed == calm
    assert 0 <= twice <= 20 * IN_FLIGHT


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_batches_that_are_killed_pay_nothing_twice(tmp_path: Path) -> None:
    steps = ("meta_topics", "sub_topics", "instructions", "related", "complicated", "responses")
    keys: dict[str, Any] = {
        f"steps__{step}": {"model": "m", "max_tokens": 64, "per_call": 2, "batch": True} for step in steps
    }
    keys |= {"models__m__json_schema": True}
    endpoint = CountingEndpoint()
    endpoint.batch_rounds = 3
    try:
        calm, killed, needed = killed_often(20, endpoint, tmp_path, 5, **keys)
        assert killed == calm and sum(endpoint.answered.values()) == needed
    finally:
        endpoint.close()
