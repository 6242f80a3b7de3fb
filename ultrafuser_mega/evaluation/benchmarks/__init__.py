"""Benchmarks by name, and suites of them.

from ultrafuser_mega.evaluation.benchmarks import SUITES, benchmark, chosen

for name in SUITES["quick"].benchmarks:
    items = chosen(benchmark(name).items(data), SUITES["quick"].groups, seed=0)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.evaluation.benchmark import Benchmark, Item
from ultrafuser_mega.evaluation.benchmarks.agieval import Aqua, Math, SatMath
from ultrafuser_mega.evaluation.benchmarks.chats import AlpacaEval, MtBench
from ultrafuser_mega.evaluation.benchmarks.gsm8k import Gsm8k
from ultrafuser_mega.evaluation.benchmarks.humaneval import HumanEval, ProgramCheck
from ultrafuser_mega.evaluation.benchmarks.toy import ToyCode, ToyMath, ToyText
from ultrafuser_mega.evaluation.benchmarks.truthfulqa import TruthfulQa

# Who needs the class takes it from here: harness.standard imports this package's parts, and cannot be imported first.
from ultrafuser_mega.evaluation.harness.standard import STANDARD
from ultrafuser_mega.evaluation.harness.standard import HarnessBenchmark as HarnessBenchmark
from ultrafuser_mega.evaluation.programs import check_program

_PLAIN = (TruthfulQa, AlpacaEval, Gsm8k, Math, SatMath, Aqua, MtBench, *STANDARD)
_WITH_PROGRAMS = (HumanEval, ToyText, ToyCode, ToyMath)


@dataclass(frozen=True)
class Suite:
    """Benchmarks that are run together, in the order of the table's columns.

    Attributes:
        benchmarks: by name.
        groups: so many of each benchmark's groups (questions), drawn by a seed; None: all.
    """

    benchmarks: tuple[str, ...]
    groups: int | None = None


_TABLE_1 = ("truthfulqa", "alpacaeval", "humaneval", "gsm8k", "math", "sat_math", "aqua")

#: paper: UltraFuser's table 1, and table 7's MT-Bench; standard: what lm-evaluation-harness asks; quick: a part of what
#: needs no judge; toy: the toy specialists'.
SUITES: Mapping[str, Suite] = MappingProxyType(
    {
        "paper": Suite((*_TABLE_1, "mt_bench")),
        "standard": Suite(tuple(one.name for one in STANDARD)),
        "quick": Suite(tuple(name for name in _TABLE_1 if name != "alpacaeval"), groups=50),
        "toy": Suite(("toy_text", "toy_code", "toy_math")),
    }
)


def benchmark(name: str, check: ProgramCheck = check_program) -> Benchmark:
    """The benchmark of this name.

    Args:
        name: of it.
        check: runs the programs of those that have any.

    Raises:
        InputError: there is none.
    """
    plain, with_programs = {one.name: one for one in _PLAIN}, {one.name: one for one in _WITH_PROGRAMS}
    if name in plain:
        return plain[name]()
    if name in with_programs:
        return with_programs[name](check)
    raise InputError(
        f"{name!r}: there is no such suite or benchmark; suites are {', '.join(SUITES)}, "
        f"benchmarks {', '.join([*plain, *with_programs])}"
    )


def chosen(items: Sequence[Item], groups: int | None, seed: int) -> list[Item]:
    """The items of ``groups`` groups, in their order: the same ones for every model, and those of fewer among those of
    more.

    Args:
        items: of a benchmark.
        groups: how many; None or more than there are: all.
        seed: of the choice.
    """
    names = dict.fromkeys(item.group or item.id for item in items)
    drawn = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    kept = set(drawn[:groups])
    return [item for item in items if (item.group or item.id) in kept]
