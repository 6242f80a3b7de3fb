"""Lists that a person looks through before the next step: written once, read back as they were left.

``review/CLASS.STEP.yaml`` holds topics, ``review/CLASS.instructions.jsonl`` a line for each instruction. Lines may be
changed, removed and added; what stands in such a file is what goes on, with or without ``--review``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.files import write_atomically
from ultrafuser_mega.synthesis.config import INSTRUCTIONS
from ultrafuser_mega.synthesis.instructions import Instruction, identity
from ultrafuser_mega.synthesis.left_out import LeftOut
from ultrafuser_mega.synthesis.requests import whole_characters
from ultrafuser_mega.synthesis.topics import Topic, read_topics, text_by_hand, write_topics

BY_HAND = "by hand"


class Review:
    """The lists of a run.

    Args:
        folder: of the run.
        wanted: write lists and stop behind each; otherwise those that are there are read.
    """

    def __init__(self, folder: Path, wanted: bool) -> None:
        self._folder = folder / "review"
        self._wanted = wanted

    def topics(self, of: str, step: str, made: list[Topic]) -> list[Topic] | Path:
        """What goes on; or the file that is to be looked through first."""
        path = self._folder / f"{of}.{step}.yaml"
        if path.is_file():
            return read_topics(path)
        return self._write(path, write_topics(made)) if self._wanted else made

    def instructions(self, of: str, made: list[Instruction], left_out: LeftOut) -> list[Instruction] | Path:
        """The same, of instructions; a text that stands twice counts once."""
        path = self._folder / f"{of}.instructions.jsonl"
        if path.is_file():
            return _without_repeats(of, _read_instructions(path, made), left_out)
        lines = [{"id": one.id, "topic": list(one.topic), "text": one.text} for one in made]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        return self._write(path, text) if self._wanted else made

    def _write(self, path: Path, text: str) -> Path:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, text)
        return path


def _without_repeats(of: str, read: Sequence[Instruction], left_out: LeftOut) -> list[Instruction]:
    kept: dict[str, Instruction] = {}
    ids: set[str] = set()
    for one in read:
        if one.text in kept:
            reason = f"repeats: {kept[one.text].id}, in what was looked through"
            left_out.add(of, INSTRUCTIONS, reason, " > ".join(one.topic), one.text)
            continue
        if one.id in ids:  # a line was copied and another text put in
            one = Instruction(identity(one.text), one.text, one.topic, BY_HAND, ())
        ids.add(one.id)
        kept[one.text] = one
    return list(kept.values())


def _read_instructions(path: Path, made: Sequence[Instruction]) -> list[Instruction]:
    known = {one.id: one for one in made}
    kept: list[Instruction] = []
    # splitlines would cut at what ends a line inside a text, as U+2028
    for number, line in enumerate(text_by_hand(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, topic = whole_characters(row["text"]).strip(), _path(row.get("topic", []))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(f'{path}:{number}: is no instruction; write {{"text": "...", "topic": [..]}}') from None
        if not text:
            raise InputError(f"{path}:{number}: the text is empty; remove the line, or write one")
        one = known.get(str(row.get("id", "")))
        if one is None:
            kept.append(Instruction(identity(text), text, topic, BY_HAND, ()))
        else:
            kept.append(one if one.text == text else replace(one, text=text))
    return kept


def _path(topic: Any) -> tuple[str, ...]:
    """Names from the top; one name alone is a path too."""
    names = [topic] if isinstance(topic, str) else topic
    if not isinstance(names, list):
        raise TypeError
    return tuple(whole_characters(str(name)) for name in names)
