"""What did not become a row, and why: nothing is dropped without a line of its own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from ultrafuser_mega.synthesis.requests import Answer, Call


class LeftOut:
    """The lines, in an order that does not depend on what was answered first."""

    def __init__(self) -> None:
        self._lines: list[dict[str, object]] = []

    def add(self, of: str, step: str, reason: str, topic: str = "", text: str = "", key: str | None = None) -> None:
        """Something is left out."""
        line = {"class": of, "step": step, "reason": reason, "topic": topic, "text": text, "key": key}
        self._lines.append({name: value for name, value in line.items() if value})

    def faults(self, call: Call, answer: Answer, path: Sequence[str] = (), text: str = "") -> None:
        """A call came to nothing, if it did."""
        if answer.value is None:
            reason = "no reply could be used: " + ", ".join(answer.faults)
            self.add(call.of, call.step, reason, " > ".join(path), text, answer.key)

    def jsonl(self) -> str:
        """All, as JSON lines."""
        lines = (json.dumps(line, ensure_ascii=False, sort_keys=True) for line in self._lines)
        return "".join(sorted(f"{line}\n" for line in lines))

    def counts(self) -> dict[tuple[str, str, str], int]:
        """By class, step and the first words of the reason."""
        keys = [(line["class"], line["step"], str(line["reason"]).partition(":")[0]) for line in self._lines]
        return dict(sorted(Counter((str(of), str(step), reason) for of, step, reason in keys).items()))
