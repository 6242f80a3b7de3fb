"""The training display: a live one in a terminal, one plain line now and then in a log.

Everything goes to standard error, so that standard output stays free for results. In a terminal each
stage has a progress bar, the numbers of the last step and the gate weights per class; where standard
error is a file, a pipe or a dumb terminal, the same as single lines. On all ranks but one, pass
``enabled=False``: same methods, nothing printed.

There is no refresh thread (``step`` redraws), so nothing here can hold a lock across a fork.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ultrafuser_mega.reporting.records import StepRecord

_MAX_WIDTH = 110  # of the progress bar's row; wider is harder to read
_REDRAW_S = 0.1
_ETA_STEPS = 50  # steps whose pace predicts the rest


@dataclass
class _Stage:
    label: str
    first_step: int
    steps: int
    began: float
    times: deque[float] = field(default_factory=lambda: deque(maxlen=_ETA_STEPS + 1))

    def done(self, record: StepRecord) -> int:
        return record.step - self.first_step + 1

    def clock_text(self, record: StepRecord | None, now: float) -> str:
        """Time to the stage's end at the pace of its last steps, pauses between them counted; then the time it took."""
        if record is None:
            return "eta -:--:--"
        left = self.steps - self.done(record)
        if left <= 0:
            return f"took {_duration(now - self.began)}"
        if len(self.times) < 2:
            return f"eta {_duration(left * record.seconds)}"
        return f"eta {_duration(left * (self.times[-1] - self.times[0]) / (len(self.times) - 1))}"


class TrainConsole:
    """Context manager that shows a run as it goes.

        with TrainConsole(enabled=rank == 0) as console:
            console.begin_stage(1, "gate only", first_step=1, steps=400)
            console.step(record)
            console.note("checkpoint written to ...")

    Args:
        enabled: False on every rank but one.
        own: class -> its own specialist, for classes that are not named like theirs. The own
            specialist's weight is highlighted: green where it leads, yellow where it does not.
        plain_every_s: seconds between plain lines; the first and the last step of a stage always get one.
        console: where to print; standard error unless told.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        enabled: bool,
        own: Mapping[str, str] | None = None,
        plain_every_s: float = 10.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._enabled = enabled
        self._own = dict(own or {})
        self._plain_every_s = plain_every_s
        self._console = console or Console(stderr=True)
        self._clock = clock
        # FORCE_COLOR makes rich take a log file for a terminal, hence the second question.
        self._is_live = self._console.is_interactive and self._console.file.isatty()
        self._live: Live | None = None
        self._stage: _Stage | None = None
        self._last: StepRecord | None = None
        self._shown_at = 0.0
        self._shown: StepRecord | None = None

    def __enter__(self) -> TrainConsole:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.end_stage()

    def begin_stage(self, number: int, title: str, *, first_step: int, steps: int) -> None:
        """Start showing a stage of ``steps`` steps; on resume ``first_step`` is still the stage's own first."""
        if not self._enabled:
            return
        self.end_stage()
        self._stage = _Stage(f"stage {number}: {title}", first_step, steps, self._clock())
        if not self._is_live:
            self._line(f"{self._stage.label}, {steps} steps")
            return
        self._live = Live(
            self._frame(),
            console=self._console,
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),
        )
        self._live.start(refresh=True)
        # A rank ended by SIGTERM (torchrun does that) cannot bring the cursor back: never hide it.
        self._console.show_cursor(True)

    def step(self, record: StepRecord) -> None:
        """Show a step of the stage that was begun."""
        if not self._enabled:
            return
        if self._stage is None:
            raise RuntimeError("begin_stage() comes before step()")
        now = self._clock()
        self._stage.times.append(now)
        is_edge = self._last is None or self._stage.done(record) >= self._stage.steps
        self._last = record
        if is_edge or now - self._shown_at >= (_REDRAW_S if self._live else self._plain_every_s):
            self._show(now)

    def note(self, text: str) -> None:
        """Print one line that stays, above the live display."""
        if self._enabled:
            self._line(text)

    def end_stage(self) -> None:
        """Leave the last state of the stage on the screen."""
        if self._last is not None and self._last is not self._shown:
            self._show(self._clock())
        if self._live is not None:
            self._live.stop()
        self._live = self._stage = self._last = self._shown = None

    def _show(self, now: float) -> None:
        self._shown_at, self._shown = now, self._last
        if self._live is not None:
            self._live.update(self._frame(), refresh=True)
        else:
            self._line(self._plain())

    def _line(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False, highlight=False, emoji=False)

    def _plain(self) -> str:
        stage, record = self._stage, self._last
        assert stage is not None and record is not None
        facts = [f"{name} {value}" for name, value in _facts(record)]
        facts.append(stage.clock_text(record, self._clock()))
        gate = "  ".join(
            f"{name}[{' '.join(self._weight(name, specialist, weight) for specialist, weight in weights.items())}]"
            for name, weights in record.gate.items()
        )
        head = f"{stage.label.split(':')[0]} step {stage.done(record)} of {stage.steps}"
        return "  ".join([head, *facts, *([f"gate {gate}"] if gate else [])])

    def _weight(self, class_name: str, specialist: str, weight: float) -> str:
        mark = "*" if specialist == self._own.get(class_name, class_name) else ""
        return f"{mark}{specialist} {weight:.2f}"

    def _frame(self) -> Group:
        stage, record = self._stage, self._last
        assert stage is not None
        done = stage.done(record) if record else 0
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.width = min(self._console.width, _MAX_WIDTH)
        for ratio in (None, 1, None, None):
            bar.add_column(ratio=ratio, no_wrap=True)
        bar.add_row(
            Text(stage.label, style="bold"),
            ProgressBar(total=max(stage.steps, 1), completed=done, complete_style="cyan", finished_style="green"),
            Text(f"{done}/{stage.steps}"),
            Text(stage.clock_text(record, self._clock()), style="cyan"),
        )
        if record is None:
            return Group(bar, Text("waiting for the first step", style="dim"))
        facts = Text("  ").join(Text.assemble((name, "dim"), " ", _fact_text(value)) for name, value in _facts(record))
        return Group(bar, facts, self._class_grid(record))

    def _class_grid(self, record: StepRecord) -> Table:
        """One line per class: its loss and the weight of every specialist, the class's own highlighted."""
        specialists = list(dict.fromkeys(name for weights in record.gate.values() for name in weights))
        grid = Table.grid(padding=(0, 3, 0, 0))
        grid.add_column(no_wrap=True)
        for _ in ("loss", *specialists):
            grid.add_column(justify="right", no_wrap=True)
        grid.add_row(*(Text(name, style="dim") for name in ("", "loss", *(f"w_{name}" for name in specialists))))
        for name, weights in record.gate.items():
            own = self._own.get(name, name)
            leads = own in weights and weights[own] >= max(weights.values())
            cells = [_fact_text(f"{record.class_loss[name]:.4f}") if name in record.class_loss else Text("-")]
            for specialist in specialists:
                style = ("bold green" if leads else "bold yellow") if specialist == own else ""
                cells.append(Text(f"{weights[specialist]:.2f}" if specialist in weights else "-", style=style))
            grid.add_row(Text(f"{name} data", style="dim"), *cells)
        return grid


def _facts(record: StepRecord) -> list[tuple[str, str]]:
    own = not math.isnan(record.gate_lr) and record.gate_lr != record.lr
    return [
        ("loss", f"{record.loss:.4f}"),
        ("lr", f"{record.lr:.2e}"),
        *([("gate lr", f"{record.gate_lr:.2e}")] if own else []),
        ("grad norm", f"{record.grad_norm:.3g}"),
        ("response tokens/s", _count(record.tokens_per_s)),
    ]


def _fact_text(value: str) -> Text:
    return Text(value, style="bold red" if value in ("nan", "inf", "-inf") else "bold")


def _count(value: float) -> str:
    """Three significant digits: 847, 12.3k, 4.56M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    """h:mm:ss, days before it where there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hour}:{minute:02}:{second:02}"
