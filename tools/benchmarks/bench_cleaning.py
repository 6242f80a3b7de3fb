"""How fast `ultrafuser clean` is: rows a second of every rule by itself, MinHash libraries, and whole files.

    python tools/benchmarks/bench_cleaning.py text=DATA/text code=DATA/code --benchmarks EVAL --out cleaning.json

The rules by themselves run over every third row, in memory and in one process, best of two turns that go round all of
them, in seconds of CPU. The whole runs over a file made of the same rows, repeated to --rows with every fifth word of
the questions changed so that they are no duplicates, with as many processes as there are cores; the peak of memory is
that of the process that reads and of all that examine, as if none of it was shared. Where datasketch is installed it is
measured beside rensa, and both against all pairs compared exactly.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ultrafuser_mega.cleaning import language
from ultrafuser_mega.cleaning.clean import Cleaner
from ultrafuser_mega.cleaning.contamination import Benchmarks
from ultrafuser_mega.cleaning.duplicates import NearDuplicates, digest_of
from ultrafuser_mega.cleaning.files import Source, clean_files
from ultrafuser_mega.cleaning.replies import FINDERS
from ultrafuser_mega.cleaning.rules import Rules
from ultrafuser_mega.cleaning.words import words
from ultrafuser_mega.data.conversation import Conversation, MalformedRowError, to_conversation
from ultrafuser_mega.data.files import expand_files
from ultrafuser_mega.data.readers import read_rows
from ultrafuser_mega.evaluation.published import published_items

THRESHOLD = 0.7
ROUNDS = 2


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="CLASS=FILES")
    parser.add_argument("--benchmarks", type=Path, required=True, help="folder of benchmark files")
    parser.add_argument("--rows", type=int, default=300_000, help="of the whole run")
    parser.add_argument("--exact", type=int, default=4000, help="questions of which all pairs are compared")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    conversations = list(_conversations(args.files))
    index = Benchmarks(published_items([args.benchmarks]))
    result: dict[str, Any] = {
        "machine": {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()},
        "rows": len(conversations),
        "items": dict(index.items),
        "rules": _rules(conversations[::3], index),
        "near_duplicates": _libraries([_question(one) for one in conversations], args.exact),
        "languages": _languages([one.turns[-1][1] for one in conversations[:: max(1, len(conversations) // 1000)]]),
        "whole": _whole(conversations, index, args.rows),
        "load": os.getloadavg(),
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def _conversations(files: Sequence[str]) -> Iterator[Conversation]:
    for text in files:
        for path in expand_files(Path(text.partition("=")[2])):
            for row in read_rows(path):
                try:
                    yield to_conversation(row.value)
                except MalformedRowError:
                    continue


def _rules(conversations: Sequence[Conversation], index: Benchmarks) -> dict[str, float]:
    """Rule -> rows a second."""
    rules = Rules(languages=("en",))
    Cleaner(rules)  # loads what tells languages

    def of_replies(name: str) -> Callable[[], None]:
        def run() -> None:
            for one in conversations:
                for question, reply in one.turns:
                    FINDERS[name](question, reply, rules)

        return run

    def near() -> None:
        seen = NearDuplicates(THRESHOLD)
        for number, one in enumerate(conversations):
            seen.match_or_add(str(number), _question(one))

    def exact() -> None:
        seen = set()
        for one in conversations:
            seen.add(digest_of([user for user, _ in one.turns]))

    def contaminated() -> None:
        for one in conversations:
            index.search(one)

    runs: dict[str, Callable[[], None]] = {name: of_replies(name) for name in FINDERS}
    runs |= {"contaminated": contaminated, "exact_duplicate": exact, "near_duplicate": near}
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            begin = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - begin)
    return {name: round(len(conversations) / seconds) for name, seconds in best.items()}


def _question(conversation: Conversation) -> str:
    return "\n".join(user for user, _ in conversation.turns)


def _libraries(questions: Sequence[str], exact: int) -> dict[str, Any]:
    """Seconds, matches and those missed, of rensa as it is used here and of datasketch used the same way."""
    few = questions[:: max(1, len(questions) // exact)][:exact]
    wanted = _matched_exactly([_shingles(text) for text in few])
    found: dict[str, Any] = {"questions": len(questions), "compared_exactly": len(few), "matched_exactly": len(wanted)}
    for name, make in (("rensa", _rensa), ("datasketch", _datasketch)):
        try:
            begin = time.process_time()
            matched = make(questions)
            seconds = time.process_time() - begin
            missed = wanted - make(few)
        except ImportError:
            found[name] = "not installed"
            continue
        found[name] = {"rows_per_s": round(len(questions) / seconds), "matched": len(matched), "missed": len(missed)}
    return found


def _shingles(text: str) -> list[str]:
    found = words(text)
    return sorted(set(map(" ".join, zip(found, found[1:], found[2:], strict=False)))) or [" ".join(found)]


def _matched_exactly(shingles: Sequence[list[str]]) -> set[int]:
    sets = [frozenset(one) for one in shingles]
    kept: list[int] = []
    matched = set()
    for number, one in enumerate(sets):
        if any(len(one & sets[other]) >= THRESHOLD * len(one | sets[other]) for other in kept):
            matched.add(number)
        else:
            kept.append(number)
    return matched


def _rensa(texts: Sequence[str]) -> set[int]:
    seen = NearDuplicates(THRESHOLD)
    return {number for number, text in enumerate(texts) if seen.match_or_add(str(number), text) is not None}


def _datasketch(texts: Sequence[str]) -> set[int]:
    from datasketch import MinHash, MinHashLSH

    sets: dict[int, frozenset[str]] = {}
    index, matched = MinHashLSH(threshold=THRESHOLD, num_perm=128, weights=(0.1, 0.9)), set()
    for number, one in enumerate(map(_shingles, texts)):
        signature = MinHash(128, seed=1)
        signature.update_batch([token.encode() for token in one])
        tokens = frozenset(one)
        if any(len(tokens & sets[other]) >= THRESHOLD * len(tokens | sets[other]) for other in index.query(signature)):
            matched.add(number)
        else:
            index.insert(number, signature)
            sets[number] = tokens
    return matched


def _languages(replies: Sequence[str]) -> dict[str, Any]:
    """Replies a second of CPU, all to the same length: py3langid and lingua in its fast mode."""
    texts = [text[:400] for text in replies]
    identify = language.identifier().classify
    found: dict[str, Any] = {"replies": len(texts), "py3langid": _rate(identify, texts)}
    try:
        from lingua import LanguageDetectorBuilder
    except ImportError:
        return {**found, "lingua": "not installed"}
    detector = LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()
    detector.detect_language_of("Its models are loaded with the first text.")
    return {**found, "lingua": _rate(detector.detect_language_of, texts)}


def _rate(function: Callable[[str], object], texts: Sequence[str]) -> int:
    begin = time.process_time()
    for text in texts:
        function(text)
    return round(len(texts) / (time.process_time() - begin))


def _whole(conversations: Sequence[Conversation], index: Benchmarks, rows: int) -> dict[str, Any]:
    generator = random.Random(0)
    vocabulary = sorted({word for one in conversations[:500] for word in words(one.turns[0][0]) if word.isalpha()})
    with TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        with path.open("w", encoding="utf-8") as file:
            for number in range(rows):
                one = conversations[number % len(conversations)]
                others = number >= len(conversations)
                messages = []
                for user, assistant in one.turns:
                    asked = _changed(user, vocabulary, generator) if others else user
                    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": assistant}]
                file.write(json.dumps({"messages": messages}) + "\n")
        begin, cpu = time.perf_counter(), _cpu_seconds()
        report = clean_files([Source(path, "all")], Path(folder, "out"), Rules(), index)
        seconds, cpu = time.perf_counter() - begin, _cpu_seconds() - cpu
        size = path.stat().st_size
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "rows": rows,
        "bytes": size,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "rows_per_s": round(rows / seconds),
        "kept": sum(report.kept.values()),
        "removed": {name: sum(counts.values()) for name, counts in report.removed.items()},
        "peak_GiB_at_most": round((peaks[0] + len(os.sched_getaffinity(0)) * peaks[1]) / 2**20, 2),
    }


def _cpu_seconds() -> float:
    return sum(os.times()[:4])


def _changed(text: str, vocabulary: Sequence[str], generator: random.Random) -> str:
    """Every fifth word is another, so that no three in a row are likely to be the same."""
    return " ".join(generator.choice(vocabulary) if generator.random() < 0.2 else word for word in text.split(" "))


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
