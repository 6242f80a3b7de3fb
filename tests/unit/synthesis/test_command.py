"""``ultrafuser synthesize`` as people call it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.command import ultrafuser
from support.counting_endpoint import Body, CountingEndpoint
from support.small_synthesis import config_text

PAPER = Path(__file__).parents[3] / "examples" / "synthesis" / "paper.yaml"


def test_a_dry_run_asks_nothing_and_says_what_each_step_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert ultrafuser(monkeypatch, "synthesize", "--config", PAPER, "--out", tmp_path / "out", "--dry-run") == 0
    lines = {tuple(line.split()[:2]): line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["math", "responses"][3] == "110,000" and lines["text", "related"][3] == "33,334"
    # 55 million tokens of 4,549 a second and GPU
    assert float(lines["math", "responses"][-2]) == pytest.approx(110_000 * 500 / 4549 / 3600, abs=0.05)
    money = float(lines["code", "related"][6])
    read, written = (float(cell.replace(",", "")) for cell in lines["code", "related"][4:6])
    assert money == pytest.approx((0.15 * read + 0.6 * written) / 1e6, abs=0.01)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_behind_some_replies_counts_with_what_they_took(
    endpoint: CountingEndpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(config_text(endpoint.url))
    assert ultrafuser(monkeypatch, "synthesize", "--config", config, "--out", tmp_path / "out") == 0
    assert f"{tmp_path}/out/data/text.jsonl: 12 rows" in capsys.readouterr().out.replace("\n", "")
    asked = len(endpoint.seen)
    assert ultrafuser(monkeypatch, "synthesize", "--config", config, "--out", tmp_path / "out", "--dry-run") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (responses,) = [cells for cells in lines if cells[:2] == ["text", "responses"]]
    assert responses[-1] == "12" and responses[5] == str(12 * 13) and len(endpoint.seen) == asked


def test_a_finished_run_leaves_a_page_of_its_rows(
    endpoint: CountingEndpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config, page = tmp_path / "c.yaml", tmp_path / "out" / "page.html"
    config.write_text(config_text(endpoint.url))
    assert ultrafuser(monkeypatch, "synthesize", "--config", config, "--out", tmp_path / "out") == 0
    assert "page.html shows topics, lengths and samples" in capsys.readouterr().out.replace("\n", "")
    first = page.read_bytes()
    rows = sum(len(path.read_text().splitlines()) for path in (tmp_path / "out" / "data").iterdir())
    assert f"{rows} rows of " in first.decode()
    assert ultrafuser(monkeypatch, "synthesize", "--config", config, "--out", tmp_path / "out") == 0
    assert page.read_bytes() == first


def test_a_limit_ends_with_a_code_of_its_own_and_a_higher_one_goes_on(
    endpoint: CountingEndpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(config_text(endpoint.url))
    words = ("synthesize", "--config", config, "--out", tmp_path / "out")
    assert ultrafuser(monkeypatch, *words, "limit.requests=10") == 4
    error = capsys.readouterr().err
    assert "stopped: limit.requests=10 is reached: 10 are used" in error and "left to do: " in error
    assert len(endpoint.seen) == 10
    assert ultrafuser(monkeypatch, *words, "limit.requests=500") == 0
    assert max(endpoint.answered.values()) == 1


def test_a_wrong_key_of_the_configuration_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("synthesize", "--config", PAPER, "--out", tmp_path, "steps.responses.temprature=1")
    assert ultrafuser(monkeypatch, *words) == 2
    assert capsys.readouterr().err == (
        f"error: {PAPER}: unknown key steps.responses.temprature; did you mean steps.responses.temperature?\n"
    )


def test_a_missing_key_is_told_by_the_variable_that_would_hold_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("openai")
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert ultrafuser(monkeypatch, "synthesize", "--config", PAPER, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: endpoints.openai: ") and "set OPENAI_API_KEY" in error and error.count("\n") == 1


@pytest.mark.timeout(120)
def test_a_signal_waits_for_what_is_under_way_and_nothing_is_paid_twice(
    endpoint: CountingEndpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    endpoint.misbehave = lambda body: time.sleep(0.05)
    config = tmp_path / "c.yaml"
    config.write_text(config_text(endpoint.url))
    command = [
        sys.executable,
        "-m",
        "ultrafuser_mega",
        "synthesize",
        "--config",
        str(config),
        "--out",
        str(tmp_path / "o"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    while len(endpoint.answered) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "ended by SIGTERM; the same command goes on" in text
    assert ultrafuser(monkeypatch, "synthesize", "--config", config, "--out", tmp_path / "o") == 0
    assert max(endpoint.answered.values()) == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_waits_for_nothing_and_the_next_run_goes_on(
    number: signal.Signals, endpoint: CountingEndpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    held = threading.Event()

    def hold(body: Body) -> None:
        if len(endpoint.answered) >= 5:
            held.wait(60)

    endpoint.misbehave = hold
    config = tmp_path / "c.yaml"
    config.write_text(config_text(endpoint.url))
    words = ["synthesize", "--config", str(config), "--out", str(tmp_path / "o")]
    command = [sys.executable, "-m", "ultrafuser_mega", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    deadline = time.monotonic() + 60
    while not (len(endpoint.answered) >= 5 and endpoint.running) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    while "waiting for what is under way; again to end at once" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=30)  # although the endpoint still holds its requests
    assert process.returncode == 128 + number
    held.set()
    assert ultrafuser(monkeypatch, *words) == 0
    assert sum(times - 1 for times in endpoint.answered.values()) <= 8  # what was under way


@pytest.mark.parametrize("override", ["models.m.model=[/b] x", "currency=[/]"])
def test_names_with_brackets_are_shown_as_they_are(
    override: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(config_text("http://127.0.0.1:9/v1"))
    quoted = f"{override.partition('=')[0]}='{override.partition('=')[2]}'"
    args = ("--config", tmp_path / "c.yaml", "--out", tmp_path / "out", "--dry-run", quoted)
    assert ultrafuser(monkeypatch, "synthesize", *args) == 0
    assert override.partition("=")[2] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models.m.parameters={temperature: 0.2}", "temperature is set by the steps"),
        ("models.m.parameters={since: 2024-01-01}", "cannot be sent as JSON"),
        ("models.m.parameters={bias: .nan}", "cannot be sent as JSON"),
        ("models.m.parameters=&a {x: *a}", "cannot be sent as JSON"),
        ("endpoints.here.url='http://[::1'", "is no address"),
        ("endpoints.here.url=http:///v1", "is no address"),
        ("endpoints.here.url=http://host:99999/v1", "is no address"),
        ("steps.responses.max_tokens=99999999999999999999", "less than 2147483648"),
    ],
)
def test_what_no_endpoint_could_be_sent_is_refused_before_anything_is(
    override: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(config_text("http://127.0.0.1:9/v1"))
    args = ("--config", tmp_path / "c.yaml", "--out", tmp_path / "out", override)
    assert ultrafuser(monkeypatch, "synthesize", *args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["sk-proj-SECRET", "gsk_SECRET", "hf_SECRET", "AIzaSECRET"])
def test_a_key_where_its_variable_belongs_is_refused_and_not_repeated(
    key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(config_text("http://127.0.0.1:9/v1", endpoints__here__key=key))
    assert ultrafuser(monkeypatch, "synthesize", "--config", tmp_path / "c.yaml", "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "endpoints.here.key: " in line and "SECRET" not in line and not (tmp_path / "out").exists()
