"""The report's parts beside bars and benchmarks: the machine, values, the toy run, training, profiles, compilation.

Each takes what its step left and yields lines of Markdown, none where the step left nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from markdown_lines import section, table

TOP = 12  # operators of a table; the JSON file has more
Part = dict[str, Any]


def machine_rows(machine: Part, versions: Part) -> list[tuple[str, str]]:
    rows = [(key, str(value)) for key, value in machine.items() if value is not None]
    if not versions:
        return rows
    rows += [("packages", ", ".join(f"{name} {found}" for name, found in versions.get("packages", {}).items()))]
    rows += [("missing packages", ", ".join(versions.get("missing", [])) or "none")]
    rows += [(key, str(versions[key])) for key in ("gpu", "programs", "nvidia_smi") if versions.get(key)]
    return rows


def values(part: Part) -> Iterator[str]:
    """How many cases of check_values.py are right, and those that are not."""
    cases = part.get("cases", [])
    if not cases:
        return
    yield from section("Values: every backend against float64, twice the same bits")
    outcomes = dict.fromkeys(case["outcome"] for case in cases)
    counts = {outcome: sum(case["outcome"] == outcome for case in cases) for outcome in outcomes}
    yield ", ".join(f"{outcome}: {count}" for outcome, count in counts.items())
    bad = [case for case in cases if case["outcome"] not in ("right", "not here")]
    if bad:
        yield ""
        yield from table(("shape", "type", "case", "", "errors beyond what is allowed"), map(_bad_case, bad))


def _bad_case(case: Part) -> tuple[str, ...]:
    allowed = case["allowed"]
    beyond = [f"{name} {error:.1e} > {allowed[name]:.1e}" for name, error in case["errors"].items()
              if error > allowed[name]]  # fmt: skip
    reason = case.get("failed") or "; ".join(beyond)
    return case["shape"], case["dtype"], case["case"], f"**{case['outcome'].upper()}**", reason


def toy(part: Part) -> Iterator[str]:
    """Losses of the toy run beside the CPU's, and what became of its commands."""
    if not part:
        return
    yield from section("Three tiny specialists, trained through the commands")
    yield from table(
        ("command", "seconds", "exit code"),
        [(c["what"], f"{c['seconds']:.1f}", str(c["exit_code"])) for c in part.get("commands", [])],
    )
    if losses := part.get("losses"):
        yield ""
        rows = [(str(r["stage"]), str(r["step"]), f"{r['here']:.5f}", f"{r['cpu']:.5f}") for r in losses]
        yield from table(("stage", "step", f"loss on {part['device']}", "on the CPU"), rows)
    if part.get("answer"):
        yield ""
        yield f"The exported model answers: {' '.join(part['answer'].split())}"
    for wrong in part.get("wrong", []):
        yield ""
        yield f"**WRONG**: {' '.join(wrong.split())}"


def beside_plain(part: Part) -> Iterator[str]:
    """Seconds per step of the trainer and of the plain script, and where they go."""
    if not part:
        return
    size = part["size"]
    shape = f"{part['layers']} layers, hidden {size['hidden_size']}, {size['dtype']}"
    yield from section(f"Training three Llamas ({shape}) beside a plain script")
    contenders = part["contenders"]
    rows = []
    for stage in ("stage1", "stage2"):
        own = contenders.get("trainer", {}).get(stage)
        for name, found in contenders.items():
            if run := found.get(stage):
                times = f"{run['median_s'] / own['median_s']:.2f}" if own else ""
                peak = f"{run['peak_bytes'] / 2**30:.1f}" if run["peak_bytes"] else ""
                rate = f"{run['response_tokens_per_s']:.0f}"
                rows.append((stage, name, f"{run['median_s'] * 1e3:.1f}", times, rate, peak))
    yield from table(("stage", "", "ms per step", "x the trainer", "response tokens/s", "peak GiB"), rows)
    for name, reason in part.get("failed", {}).items():
        yield ""
        yield f"**FAILED**: {name} ({reason})"
    tables = {f"{name}, {stage}": run["operators"] for name, found in contenders.items()
              for stage, run in found.items() if isinstance(run, dict)}  # fmt: skip
    yield from operators("One step", tables)


def operators(what: str, tables: Part) -> Iterator[str]:
    """The operators and kernels that took longest, a table each."""
    for name, rows in tables.items():
        yield from section(f"{what}: where the time goes: {name}")
        numbers = [(row["name"], str(row["calls"]), f"{row['own_ms']:.3f}") for row in rows[:TOP]]
        yield from table(("operator or kernel", "calls", "own ms"), numbers)


def questions(part: Part) -> Iterator[str]:
    """How fast what the kernels are made of is, each beside what it could be instead."""
    if records := part.get("questions"):
        yield from section("What the kernels are made of")
        rows = [(r["question"], r["what"], f"{r['ms']:.3f}", f"{r['rate']:.1f} {r['unit']}") for r in records]
        yield from table(("question", "", "ms", "rate"), rows)


def layer_kernels(part: Part) -> Iterator[str]:
    """A decoder layer's own operations and their peers beside a copy of as many bytes."""
    if records := part.get("results"):
        yield from section("A decoder layer's kernels beside a copy of as many bytes")
        names = [(r["shape"], r["operation"], r["variant"]) for r in records]
        numbers = [(f"{r['median_us']:.1f}", f"{r['gb_per_s']:.0f}", f"{r['of_copy']:.1%}") for r in records]
        rows = [name + row for name, row in zip(names, numbers, strict=True)]
        yield from table(("shape", "operation", "variant", "us", "GB/s", "of copy"), rows)


def saving(part: Part) -> Iterator[str]:
    """What a save takes from training, and of host memory."""
    if not part:
        return
    yield from section(f"A save of {part['bytes_written'] / 1e9:.1f} GB beside {part['steps']} steps")
    rows = [(f"seconds lost, {kind}", of) for kind, of in part["lost"].items()]
    rows += [("background / waited for", part["ratio"]), ("the same, until it is done", part["ratio_until_done"])]
    yield from table(
        ("", "median", "least", "most"),
        [(name, *(f"{of[key]:.3f}" for key in ("median", "least", "most"))) for name, of in rows],
    )
    yield ""
    yield f"Host memory of the save: {part['memory']['over_bytes_written']:.2f} x what it writes"


def warmed(part: Part) -> Iterator[str]:
    if not part:
        return
    kernels = part["kernels"]
    yield from section("Kernels compiled in the background")
    failed = [kernel for kernel in kernels if "failed" in kernel]
    yield f"{len(kernels) - len(failed)} of {part['jobs']} for sm_{part['capability']} in {part['seconds']:.0f} s"
    if failed:
        yield ""
        rows = [(k["kernel"], k["dtype"], str(k.get("config", "")), k["failed"]) for k in failed]
        yield from table(("kernel", "type", "tile", "does not compile"), rows)
