"""How well global batches pack: padding, imbalance between replicas and fill, beside batching by samples.

    ultrafuser prepare --config run.yaml
    python tools/benchmarks/measure_packing.py run.yaml --dp 1 2 8 32 64 --out docs/benchmarks/packing.json

Reads a prepared token store; nothing is trained, so it takes seconds. "By samples" is the usual way: the batch sorted
by length, equally many samples in each microbatch, dealt over the replicas, padded to the longest. "Least" is what no
placement of whole samples can go below: the longest sample alone, in parts of the mean replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scripting import Parser, positive, result_file, write_json

from ultrafuser_mega.config import load_config
from ultrafuser_mega.data.batches import Shard, TrainingBatches, packing_of
from ultrafuser_mega.data.packing import spread
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.errors import InputError


@dataclass(frozen=True)
class Row:
    """Means over the steps measured; the two imbalances are of the slowest replica, in parts of the mean."""

    dp: int
    padding: float
    imbalance: float
    least_imbalance: float
    fill: float
    microbatches: float  # per replica
    padding_by_samples: float | None  # None where the batch does not divide
    imbalance_by_samples: float | None


def measure(
    store: TokenStore, samples_per_class: int, microbatch_tokens: int, dp: int, multiple: int, samples: int, steps: int
) -> Row:
    """Pack ``steps`` global batches over ``dp`` replicas; ``samples``: of a microbatch, the other way."""
    shard = Shard(0, dp, microbatch_tokens, store.specialists, dict.fromkeys(store.specialists, multiple), pad_id=0)
    batches = TrainingBatches(store, samples_per_class, seed=0, shard=shard)
    packed, by_samples, least, count = [], [], [], 0
    for step in range(steps):
        lengths = batches.lengths(batches.sampler.batch(step))
        longest = np.maximum.reduce(list(lengths.values()))
        plan = spread(longest, dp, microbatch_tokens)
        packed.append(packing_of(plan, lengths, shard))
        least.append(max(1.0, float(longest.max() * dp / longest.sum())))
        count += sum(map(len, plan))
        if len(longest) % (samples * dp) == 0:
            by_samples.append(_by_samples(list(lengths.values()), longest, samples, dp, multiple))
    return Row(
        dp=dp,
        padding=float(np.mean([one.padding for one in packed])),
        imbalance=float(np.mean([one.imbalance for one in packed])),
        least_imbalance=float(np.mean(least)),
        fill=float(np.mean([one.fill for one in packed])),
        microbatches=count / steps / dp,
        padding_by_samples=float(np.mean([padding for padding, _ in by_samples])) if by_samples else None,
        imbalance_by_samples=float(np.mean([imbalance for _, imbalance in by_samples])) if by_samples else None,
    )


def _by_samples(
    lengths: Sequence[np.ndarray], longest: np.ndarray, samples: int, dp: int, multiple: int
) -> tuple[float, float]:
    """(padding, imbalance) of microbatches of equally many samples."""
    order = np.argsort(-longest, kind="stable").reshape(-1, samples, dp)
    order[:, 1::2] = order[:, 1::2, ::-1]  # back and forth, so that no replica always gets the longer ones
    padded = sum(-(-of_one[order].max(axis=1) // multiple) * multiple * samples for of_one in lengths)  # (slots, dp)
    assert isinstance(padded, np.ndarray)
    loads = padded.sum(axis=0)
    return 1 - sum(of_one.sum() for of_one in lengths) / loads.sum(), loads.max() / loads.mean()


def show(rows: Sequence[Row], title: str) -> None:
    """The table of a measurement."""
    table = Table(title=title)
    for name in ("dp", "padding", "slowest / mean", "least", "fill", "microbatches"):
        table.add_column(name, justify="right")
    table.add_column("by samples: padding", justify="right")
    table.add_column("slowest / mean", justify="right")
    for row in rows:
        table.add_row(
            str(row.dp),
            f"{row.padding:.1%}",
            f"{row.imbalance:.3f}",
            f"{row.least_imbalance:.3f}",
            f"{row.fill:.1%}",
            f"{row.microbatches:.1f}",
            "does not divide" if row.padding_by_samples is None else f"{row.padding_by_samples:.1%}",
            "" if row.imbalance_by_samples is None else f"{row.imbalance_by_samples:.3f}",
        )
    Console().print(table)


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    parser.add_argument("config", type=Path, help="a run's configuration, its data prepared")
    parser.add_argument("overrides", nargs="*", help="key.sub=value")
    parser.add_argument("--dp", type=positive, nargs="+", default=[1, 2, 8, 32, 64], help="numbers of replicas")
    parser.add_argument(
        "--multiple", type=positive, default=8, help="tp, under sequence parallelism (default: %(default)s)"
    )
    parser.add_argument("--samples", type=positive, default=4, help="of a microbatch by samples (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=60, help="global batches to pack (default: %(default)s)")
    parser.add_argument("--out", type=result_file, help="also write the rows there, as JSON")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
        store = TokenStore.open(config.store_dir, verify=False)
    except InputError as error:
        parser.error(str(error))
    per_class, tokens = config.stage2.samples_per_class, config.microbatch_tokens
    rows = [
        measure(store, per_class, tokens, dp, arguments.multiple, arguments.samples, arguments.steps)
        for dp in arguments.dp
    ]
    show(rows, f"{per_class} x {len(store.class_names)} samples a step, microbatches of {tokens} tokens")
    if arguments.out:
        settings = {"samples_per_class": per_class, "classes": len(store.class_names), "microbatch_tokens": tokens}
        settings |= {name: getattr(arguments, name) for name in ("multiple", "samples", "steps")}
        write_json(arguments.out, {"settings": settings, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
