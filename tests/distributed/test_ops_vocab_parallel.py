"""The loss over gloo ranks that hold the vocabulary in shards equals the loss of one process that holds it all.

Under a group the gate's gradient is complete on every rank, a head's gradient belongs to the rank's rows and a hidden
state's gradient is the rank's part: the parts must add up.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.mixture_cases import Answer, Case, answer_of, make_case, relative_error, truth

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.ops import chunk, chunked, gate_only, mixture_cross_entropy
from ultrafuser_mega.runtime.spawn import run_ranks

BACKENDS = ["reference", "chunked", "gate_only"]
VOCAB = 53
# rows of the padded vocabulary that each rank holds; 53 are real
SHARDS = {
    "two even": [27, 27],
    "three uneven": [20, 20, 14],
    "four, the last all padding": [20, 20, 13, 7],
    "four, one without rows": [0, 30, 20, 3],
}
NEEDS = [(True, True, True), (True, False, False)]  # gate, hidden, heads


def cases(dtype: torch.dtype) -> list[Case]:
    common: dict[str, Any] = {"widths": (4, 6, 3), "vocab": VOCAB, "padding": 8, "dtype": dtype}
    return [
        make_case(31, rows=23, reduction="mean", **common),
        make_case(32, rows=23, reduction="sum", label_smoothing=0.1, z_loss=0.01, **common),
        make_case(33, rows=23, reduction="none", label_smoothing=0.1, z_loss=0.01, **common),
        make_case(34, rows=0, reduction="mean", **common),
        make_case(35, rows=4, reduction="mean", ignored=2.0, **common),
        make_case(36, rows=9, reduction="sum", logit_scale=1e4, **common),
    ]


def on_shard(case: Case, rank: int, rows: list[int]) -> Case:
    start = sum(rows[:rank])
    heads = [head[start : start + rows[rank]] for head in case.heads]
    return Case(case.hidden, heads, case.gate_logits, case.target, case.options | {"vocab_start": start})


def as_lists(answer: Answer) -> dict[str, Any]:
    """Tensors cannot outlive the rank that made them; nested lists can, bit for bit."""
    return {"loss": answer.loss.tolist()} | {name: g.double().tolist() for name, g in answer.gradients().items()}


def rank_answers(rank: int) -> dict[Any, dict[str, Any]]:
    """(layout, backend, dtype, case, needs) -> answer, for the layouts this rank takes part in."""
    chunked.buffer_budget = gate_only.buffer_budget = lambda device: 2 * 27 * 8 * 5  # so that there are several chunks
    answers = {}
    for layout, rows in SHARDS.items():
        group = dist.new_group(list(range(len(rows))))
        if rank >= len(rows):
            continue
        for dtype in (torch.float64, torch.bfloat16):
            for backend in BACKENDS:
                for index, case in enumerate(cases(dtype)):
                    for needs in NEEDS[backend == "gate_only" :]:
                        answer = answer_of(
                            mixture_cross_entropy, on_shard(case, rank, rows), needs, group=group, backend=backend
                        )
                        answers[layout, backend, dtype, index, needs] = as_lists(answer)
    return answers


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, dict[str, Any]]]:
    return run_ranks(rank_answers, 4)


def parts_of(ranks: list[dict[Any, dict[str, Any]]], *key: object) -> list[dict[str, torch.Tensor]]:
    """Every participating rank's answer."""
    return [tensors(answers[key]) for answers in ranks if key in answers]


def tensors(answer: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in answer.items()}


@pytest.mark.parametrize(
    ("backend", "needs"),
    [(backend, needs) for backend in BACKENDS for needs in NEEDS[backend == "gate_only" :]],
)
@pytest.mark.parametrize("layout", SHARDS)
def test_shards_equal_one_process(layout: Any, backend: str, needs: Any, ranks: Any) -> None:
    for index, case in enumerate(cases(torch.float64)):
        true = truth(case)
        parts = parts_of(ranks, layout, backend, torch.float64, index, needs)
        assert len(parts) == len(SHARDS[layout])
        for part in parts:
            assert torch.equal(part["loss"], parts[0]["loss"])
            assert torch.equal(part["gate"], parts[0]["gate"])
        assert relative_error(parts[0]["loss"], true.loss) <= 1e-12
        assert relative_error(parts[0]["gate"].view_as(true.gate), true.gate) <= 1e-11
        if needs == NEEDS[1]:
            assert parts[0].keys() == {"loss", "gate"}
            continue
        for j in range(3):
            total = torch.stack([part[f"hidden[{j}]"] for part in parts]).sum(0).view_as(true.hidden[j])
            assert relative_error(total, true.hidden[j]) <= 1e-11
            heads = torch.cat([part[f"heads[{j}]"] for part in parts if part[f"heads[{j}]"].numel()])
            assert relative_error(heads, true.heads[j][: heads.shape[0]]) <= 1e-11


@pytest.mark.parametrize("layout", SHARDS)
def test_bf16_shards_keep_the_precision_of_one_process(layout: Any, ranks: Any) -> None:
    """Each part is rounded to bf16 once or twice (2^-9 relative), so their sum errs by a few roundings at most."""
    for index, case in enumerate(cases(torch.bfloat16)[:3]):
        true = truth(case)
        parts = parts_of(ranks, layout, "chunked", torch.bfloat16, index, NEEDS[0])
        assert relative_error(parts[0]["loss"], true.loss) <= 1e-5
        for j in range(3):
            total = torch.stack([part[f"hidden[{j}]"] for part in parts]).sum(0)
            assert relative_error(total, true.hidden[j]) <= 4 * 2**-9


def rank_planes(rank: int) -> dict[Any, dict[str, Any]]:
    """As rank_answers, of hidden states so wide that every specialist's logits are kept apart, which is checked."""
    from ultrafuser_mega.ops import planes

    original, taken = planes.mixture_loss, []

    def spy(*arguments: Any) -> Any:
        taken.append(arguments)
        return original(*arguments)

    planes.mixture_loss = spy  # type: ignore[assignment]
    answers = {}
    for layout, rows in SHARDS.items():
        group = dist.new_group(list(range(len(rows))))
        if rank >= len(rows):
            continue
        for index, case in enumerate(wide_cases()):
            answer = answer_of(mixture_cross_entropy, on_shard(case, rank, rows), group=group, backend="chunked")
            answers[layout, index] = as_lists(answer)
            assert len(taken) == len(answers)
    return answers


def wide_cases() -> list[Case]:
    common: dict[str, Any] = {"rows": 23, "widths": (40, 60, 30), "vocab": VOCAB, "padding": 8, "dtype": torch.float64}
    options: list[dict[str, Any]] = [
        {"reduction": "mean"},
        {"reduction": "none", "label_smoothing": 0.1, "z_loss": 0.01},
    ]
    return [make_case(38, **common, **each) for each in options]


def test_shards_of_wide_hidden_states_equal_one_process() -> None:
    answers = run_ranks(rank_planes, 4)
    for layout in SHARDS:
        for index, case in enumerate(wide_cases()):
            true, parts = truth(case), parts_of(answers, layout, index)
            assert len(parts) == len(SHARDS[layout])
            assert all(torch.equal(part[name], parts[0][name]) for part in parts for name in ("loss", "gate"))
            assert relative_error(parts[0]["loss"], true.loss) <= 1e-12
            assert relative_error(parts[0]["gate"], true.gate) <= 1e-11
            for j in range(3):
                total = torch.stack([part[f"hidden[{j}]"] for part in parts]).sum(0)
                assert relative_error(total, true.hidden[j]) <= 1e-11
                heads = torch.cat([part[f"heads[{j}]"] for part in parts if part[f"heads[{j}]"].numel()])
                assert relative_error(heads, true.heads[j][: heads.shape[0]]) <= 1e-11


def refusals_and_repeats(rank: int) -> tuple[list[str], bool]:
    case = on_shard(cases(torch.float32)[1], rank, SHARDS["two even"])
    group = dist.group.WORLD
    messages = []
    for change in ({"vocab_size": None}, {"vocab_start": -1}):
        options = case.options | change
        try:
            mixture_cross_entropy(case.hidden, case.heads, case.gate_logits, case.target, group=group, **options)
        except InputError as error:
            messages.append(str(error))
    first, second = (as_lists(answer_of(mixture_cross_entropy, case, group=group)) for _ in range(2))
    return messages, first == second


def test_a_sharded_call_repeats_every_bit_and_must_say_how_large_the_vocabulary_is() -> None:
    for messages, same_bits in run_ranks(refusals_and_repeats, 2):
        assert same_bits
        assert messages[0].startswith(
            "vocab_size: needed when the heads are sharded over a group (this one has 2 ranks)"
        )
        assert messages[1].startswith("vocab_start: -1")


WRONG_SHARDS = {  # [start, stop) of each rank's rows of a vocabulary of 53, and how many of them there are in all
    "overlap": ([(0, 27), (20, 53)], 60),
    "the same shard twice": ([(0, 53), (0, 53)], 106),
    "gap": ([(0, 20), (27, 53)], 46),
    "a rank's shard missing": ([(0, 20), (20, 40), (45, 53)], 48),
    "padding beyond the vocabulary does not fill a gap": ([(0, 20), (20, 30), (40, 53), (53, 61)], 43),
}


def messages_of_wrong_shards(rank: int) -> dict[tuple[str, str], str]:
    chunked.buffer_budget = gate_only.buffer_budget = lambda device: 2 * 27 * 8 * 5  # several chunks are on their way
    case = cases(torch.float32)[0]
    messages = {}
    for name, (shards, _) in WRONG_SHARDS.items():
        group = dist.new_group(list(range(len(shards))))
        start, stop = shards[rank] if rank < len(shards) else (0, 53)
        heads = [head[start:stop] for head in case.heads]
        for backend in BACKENDS:
            gate = case.gate_logits.clone().requires_grad_()
            options = case.options | {"vocab_start": start, "group": group, "backend": backend}
            try:
                mixture_cross_entropy(case.hidden, heads, gate, case.target, **options)
            except InputError as error:
                messages[name, backend] = str(error)
    return messages


def test_shards_that_overlap_or_leave_gaps_are_refused_on_every_rank_and_other_ranks_are_no_shard_at_all() -> None:
    for rank, messages in enumerate(run_ranks(messages_of_wrong_shards, 4)):
        for name, (shards, total) in WRONG_SHARDS.items():
            expected = f"the shards of the group hold {total} rows of the vocabulary in all, needed vocab_size = 53"
            if rank >= len(shards):
                expected = "group: this rank is not a member of it"
            for backend in BACKENDS:
                assert expected in messages[name, backend]
                assert "\n" not in messages[name, backend]


def order_of_products_and_waits(rank: int) -> list[str]:
    """What two ranks do, one after the other, with chunks of two rows or so: "logits 0", "send 0", "wait 0", ..."""
    case = on_shard(make_case(37, rows=8, vocab=54, widths=(4, 6)), rank, SHARDS["two even"])
    chunked.buffer_budget = lambda device: 2 * (2 * (27 * 4 + 10 * 4) + 10 * 4)  # as Plan counts a row
    events: list[str] = []

    class Pending(chunk.PendingStatistics):
        def __init__(self, *arguments: Any) -> None:
            self.index = sum(event.startswith("send") for event in events)
            events.append(f"send {self.index}")
            super().__init__(*arguments)

        def wait(self) -> Any:
            events.append(f"wait {self.index}")
            return super().wait()

    product = chunked.gemm.accumulate

    def accumulate(out: Any, a: Any, b: Any, *, add: Any, alpha: Any = 1.0) -> None:
        if out.shape[1] == 27 and not add:  # the first specialist's part of a chunk's logits
            events.append(f"logits {sum(event.startswith('logits') for event in events)}")
        product(out, a, b, add=add, alpha=alpha)

    chunk.PendingStatistics = Pending  # type: ignore[misc, assignment]
    chunked.gemm.accumulate = accumulate
    answer_of(mixture_cross_entropy, case, (True, True, False), group=dist.group.WORLD, backend="chunked")
    return events


def test_a_chunks_statistics_travel_while_the_next_chunks_products_run() -> None:
    """The collective is hidden: between its start and the wait for it lies a chunk's work."""
    for events in run_ranks(order_of_products_and_waits, 2):
        chunks = sum(event.startswith("send") for event in events)
        assert chunks >= 3
        assert sorted(events) == sorted(f"{what} {i}" for what in ("logits", "send", "wait") for i in range(chunks))
        for i in range(chunks):
            assert events.index(f"logits {i}") < events.index(f"send {i}") < events.index(f"wait {i}")
        for i in range(chunks - 1):
            assert events.index(f"logits {i + 1}") < events.index(f"wait {i}")
