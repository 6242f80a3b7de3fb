"""The training display: live in a terminal, sparse plain lines elsewhere, silent where it is disabled."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from ultrafuser_mega.reporting.console import TrainConsole

_ESCAPE = "\x1b"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _log(**options: Any) -> tuple[TrainConsole, io.StringIO, _Clock]:
    output, clock = io.StringIO(), _Clock()
    console = TrainConsole(enabled=True, console=Console(file=output), clock=clock, **options)
    return console, output, clock


def _terminal(width: int = 100, **options: Any) -> tuple[TrainConsole, _Terminal, _Clock]:
    output, clock = _Terminal(), _Clock()
    rich_console = Console(
        file=output, force_terminal=True, force_interactive=True, width=width, height=30, _environ={}
    )
    return TrainConsole(enabled=True, console=rich_console, clock=clock, **options), output, clock


def _text(output: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())


def test_a_log_gets_first_step_last_step_and_one_line_per_interval(step_of: Any) -> None:
    console, output, clock = _log(plain_every_s=10.0)
    with console:
        console.begin_stage(1, "gate only", first_step=1, steps=30)
        for step in range(1, 31):
            clock.now += 1.0
            console.step(step_of(step))
    lines = output.getvalue().splitlines()
    assert lines[0] == "stage 1: gate only, 30 steps"
    assert re.findall(r"stage 1 step (\d+) of 30", output.getvalue()) == ["1", "11", "21", "30"]
    assert len(lines) == 5


def test_a_log_line_is_one_line_of_plain_ascii_with_every_number(step_of: Any) -> None:
    console, output, _ = _log()
    with console:
        console.begin_stage(2, "everything", first_step=401, steps=100)
        console.step(step_of(401, stage=2))
    line = output.getvalue().splitlines()[1]
    assert line == (
        "stage 2 step 1 of 100  loss -1.0100  lr 2.00e-03  grad norm 0.5  response tokens/s 12.3k  eta 0:00:25  "
        "gate text[*text 0.45 code 0.29 math 0.26]  code[text 0.23 *code 0.59 math 0.18]  "
        "math[text 0.18 code 0.39 *math 0.43]"
    )


def test_the_last_step_is_shown_even_when_a_run_is_cut_off(step_of: Any) -> None:
    console, output, clock = _log()
    with pytest.raises(KeyboardInterrupt), console:
        console.begin_stage(1, "gate only", first_step=1, steps=400)
        for step in (1, 2, 3):
            clock.now += 1.0
            console.step(step_of(step))
        raise KeyboardInterrupt
    assert "stage 1 step 3 of 400" in output.getvalue().splitlines()[-1]


def test_force_color_does_not_turn_a_log_file_into_a_live_display(step_of: Any) -> None:
    output = io.StringIO()
    with TrainConsole(enabled=True, console=Console(file=output, _environ={"FORCE_COLOR": "1"})) as console:
        console.begin_stage(1, "gate only", first_step=1, steps=2)
        console.step(step_of(1))
    assert _ESCAPE not in output.getvalue()


def test_a_terminal_shows_bar_numbers_and_gate_per_class(step_of: Any) -> None:
    console, output, clock = _terminal()
    with console:
        console.begin_stage(1, "gate only", first_step=1, steps=4)
        clock.now += 2.0
        console.step(step_of(1))
        clock.now += 2.0
        console.step(step_of(2))
    shown = _text(output)
    assert "waiting for the first step" in shown
    assert "2/4 eta 0:00:04" in shown  # two steps left at two seconds each
    assert "loss 2.9800  lr 2.00e-03  grad norm 0.5  response tokens/s 12.3k" in shown
    assert re.search(r"loss +w_text +w_code +w_math", shown)
    assert re.search(r"code data +3\.0800 +0\.23 +0\.59 +0\.18", shown)


def test_a_finished_stage_says_how_long_it_took(step_of: Any) -> None:
    console, output, clock = _terminal()
    with console:
        console.begin_stage(1, "gate only", first_step=1, steps=1)
        clock.now += 3725.0
        console.step(step_of(1))
    assert "1/1 took 1:02:05" in _text(output)


def test_the_live_display_redraws_at_most_ten_times_a_second(step_of: Any) -> None:
    console, output, clock = _terminal()
    with console:
        console.begin_stage(1, "gate only", first_step=1, steps=1000)
        for step in range(1, 501):
            clock.now += 0.01
            console.step(step_of(step))
    frames = _text(output).count("response tokens/s")
    assert 40 <= frames <= 60  # 5 seconds


@pytest.mark.parametrize(("weights", "color"), [((0.6, 0.4), "32"), ((0.4, 0.6), "33")])
def test_the_own_specialist_is_green_where_it_leads_and_yellow_where_it_does_not(
    step_of: Any, weights: Any, color: Any
) -> None:
    console, output, _ = _terminal(own={"law": "jurist"})
    gate = {"law": dict(zip(("jurist", "coder"), weights, strict=True))}
    with console:
        console.begin_stage(1, "gate only", first_step=1, steps=1)
        console.step(step_of(1, gate=gate, class_loss={"law": 2.0}))
    assert re.search(rf"\x1b\[1;{color}m *{weights[0]:.2f}\x1b\[0m", output.getvalue())


def test_a_loss_that_is_not_finite_stands_out(step_of: Any) -> None:
    console, output, _ = _terminal()
    with console:
        console.begin_stage(1, "gate only", first_step=1, steps=1)
        console.step(step_of(1, loss=float("nan")))
    assert "1;31mnan" in output.getvalue()


def test_a_note_stays_and_is_printed_as_it_is(step_of: Any) -> None:
    for console, output, _ in (_log(), _terminal()):
        with console:
            console.begin_stage(1, "gate only", first_step=1, steps=2)
            console.note("wrote runs/[demo]/step_2 :smile:")
            console.step(step_of(1))
        assert "wrote runs/[demo]/step_2 :smile:\n" in _text(output).replace("\r", "")


def test_a_disabled_console_prints_nothing_and_takes_the_same_calls(
    step_of: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    with TrainConsole(enabled=False) as console:
        console.begin_stage(1, "gate only", first_step=1, steps=1)
        console.step(step_of(1))
        console.note("hello")
    assert capfd.readouterr() == ("", "")


def test_the_cursor_is_not_left_hidden_while_live(step_of: Any) -> None:
    console, output, _ = _terminal()
    with console:
        console.begin_stage(1, "gate only", first_step=1, steps=2)
        console.step(step_of(1))
        written = output.getvalue()
    assert written.rfind(f"{_ESCAPE}[?25h") > written.rfind(f"{_ESCAPE}[?25l")


def test_a_step_without_a_stage_is_a_mistake_of_the_caller(step_of: Any) -> None:
    with pytest.raises(RuntimeError, match="begin_stage"):
        TrainConsole(enabled=True).step(step_of(1))
