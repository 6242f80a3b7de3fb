"""Whether `ultrafuser clean` finds benchmarks' items that are planted in rows, in every dress, and what it says of rows
that were not planted.

    python tools/benchmarks/plant_items.py --benchmarks EVAL code=DATA/code --out planted.json

Every item that is long enough is planted once in each dress. "number changed" replaces every number by another one;
items without numbers are left out there.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ultrafuser_mega.cleaning.contamination import SHORTEST, Benchmarks, BenchmarkText
from ultrafuser_mega.cleaning.words import words
from ultrafuser_mega.data.conversation import Conversation, MalformedRowError, to_conversation
from ultrafuser_mega.data.files import expand_files
from ultrafuser_mega.data.readers import read_rows
from ultrafuser_mega.evaluation.published import published_items

Turns = tuple[tuple[str, str], ...]
REPLY = "Let us think about it."
DRESSES: dict[str, Callable[[str], Turns]] = {
    "verbatim": lambda text: ((text, REPLY),),
    "case and punctuation": lambda text: ((re.sub(r"[,.?!;:]", " -", text).upper(), REPLY),),
    "in a longer text": lambda text: ((f"Here is something for you to solve. {text} Take your time over it.", REPLY),),
    "in a later turn": lambda text: (("Hello!", "How can I help?"), (text, REPLY)),
    "number changed": lambda text: ((re.sub(r"\d+", lambda found: str(int(found[0]) + 17), text), REPLY),),
}


def main() -> None:
    """Plant, search, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="CLASS=FILES that hold no copies, to see what is taken for one")
    parser.add_argument("--benchmarks", type=Path, required=True, help="folder of benchmark files")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    items = published_items([args.benchmarks])
    index = Benchmarks(items)
    result = {
        "planted": {name: _planted(items, index, name) for name in DRESSES},
        "rows": {text.partition("=")[0]: _met(Path(text.partition("=")[2]), index) for text in args.files},
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def _planted(items: Sequence[BenchmarkText], index: Benchmarks, dress: str) -> dict[str, dict[str, int]]:
    """Benchmark -> planted, and of these "copy" (the row goes), "near" (it is listed)."""
    found: dict[str, Counter[str]] = {}
    for item in items:
        has_number = any(any(map(str.isdigit, word)) for word in words(item.question))
        if len(words(item.question)) < SHORTEST or (dress == "number changed" and not has_number):
            continue
        counts = found.setdefault(item.benchmark, Counter(planted=0, copy=0, near=0))
        counts["planted"] += 1
        hits = [
            hit for hit in index.search(Conversation(DRESSES[dress](item.question))) if hit.benchmark == item.benchmark
        ]
        how = next((how for how in ("copy", "near") if any(hit.how == how for hit in hits)), None)
        if how is not None:
            counts[how] += 1
    return {name: dict(counts) for name, counts in found.items()}


def _met(files: Path, index: Benchmarks) -> dict[str, Any]:
    """How many rows are copies by the default rule, by the paper's, and the phrases that the latter goes by most."""
    rows = copies = shared = 0
    phrases: Counter[str] = Counter()
    for path in expand_files(files):
        for row in read_rows(path):
            try:
                hits = index.search(to_conversation(row.value))
            except MalformedRowError:
                continue
            rows += 1
            copies += any(hit.how == "copy" for hit in hits)
            shared += any(hit.how != "near" for hit in hits)
            phrases.update({hit.text for hit in hits if hit.how == "shared"})
    return {"rows": rows, "share": copies, "any": shared, "phrases": phrases.most_common(8)}


if __name__ == "__main__":
    main()
