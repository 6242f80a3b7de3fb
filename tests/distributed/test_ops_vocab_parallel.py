"""The loss over gloo ranks that hold the vocabulary in shards equals the loss of one process that holds it all.

Under a group the gate's gradient is complete on every rank, a head's gradient belongs to the rank's rows and a hidden
state's gradient is the rank's part: the parts must add up.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.ops import chunked, mixture_cross_entropy
from ultrafuser_mega.ops.testing import Case, answer_of, make_case, relative_error, truth
from ultrafuser_mega.runtime.spawn import run_ranks

BACKENDS = ["reference", "chunked"]
VOCAB = 53
# rows of the padded vocabulary that each rank holds; 53 are real
SHARDS = {
    "two even": [27, 27],
    "three uneven": [20, 20, 14],
    "four, the last all padding": [20, 20, 13, 7],
    "four, one without rows": [0, 30, 20, 3],
}


def on_shard(case: Case, rank: int, rows: list[int]) -> Case:
    start = sum(rows[:rank])
    heads = [head[start : start + rows[rank]] for head in case.heads]
    return Case(case.hidden, heads, case.gate_logits, case.target, case.options | {"vocab_start": start})


def all_answers(rank: int, rows: list[int], backend: str, dtype: torch.dtype) -> list:
    group = dist.group.WORLD
    chunked.DEFAULT_BUFFER_BYTES["cpu"] = 2 * 27 * 8 * 5  # several chunks, so that collectives are in flight
    answers = []
    for case in cases(dtype):
        for needs in ((True, True, True), (True, False, False)):
            local = on_shard(case, rank, rows)
            answers.append(answer_of(mixture_cross_entropy, local, needs, group=group, backend=backend))
    return answers


def cases(dtype: torch.dtype = torch.float64) -> list[Case]:
    common = {"widths": (4, 6, 3), "vocab": VOCAB, "padding": 8, "dtype": dtype}
    return [
        make_case(31, rows=23, reduction="mean", **common),
        make_case(32, rows=23, reduction="sum", label_smoothing=0.1, z_loss=0.01, **common),
        make_case(33, rows=23, reduction="none", label_smoothing=0.1, z_loss=0.01, **common),
        make_case(34, rows=0, reduction="mean", **common),
        make_case(35, rows=4, reduction="mean", ignored=2.0, **common),
        make_case(36, rows=9, reduction="sum", logit_scale=1e4, **common),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", SHARDS)
def test_shards_equal_one_process(layout, backend):
    rows = SHARDS[layout]
    ranks = run_ranks(all_answers, len(rows), rows, backend, torch.float64)
    expected = [truth(case) for case in cases() for _ in range(2)]
    for index, true in enumerate(expected):
        parts = [answers[index] for answers in ranks]
        for part in parts:
            assert torch.equal(part.loss, parts[0].loss)
            assert torch.equal(part.gate, parts[0].gate)
        assert relative_error(parts[0].loss, true.loss) <= 1e-12
        assert relative_error(parts[0].gate, true.gate) <= 1e-11
        for j in range(3):
            if parts[0].hidden[j] is None:
                continue
            assert relative_error(sum(part.hidden[j] for part in parts), true.hidden[j]) <= 1e-11
            heads = torch.cat([part.heads[j] for part in parts])
            assert relative_error(heads, true.heads[j][: heads.shape[0]]) <= 1e-11


def test_bf16_shards_keep_the_precision_of_one_process():
    """Parts are rounded to bf16 once (2^-9 relative), so their sum errs by no more than a few roundings."""
    rows = SHARDS["three uneven"]
    ranks = run_ranks(all_answers, len(rows), rows, "chunked", torch.bfloat16)
    for index, case in enumerate(cases(torch.bfloat16)[:3]):
        true = truth(case)
        parts = [answers[2 * index] for answers in ranks]
        assert relative_error(parts[0].loss, true.loss) <= 1e-5
        for j in range(3):
            total = sum(part.hidden[j].float() for part in parts)
            assert relative_error(total, true.hidden[j]) <= 4 * 2**-9


def same_bits_twice(rank: int) -> bool:
    case = on_shard(cases(torch.float32)[1], rank, SHARDS["two even"])
    first, second = (answer_of(mixture_cross_entropy, case, group=dist.group.WORLD) for _ in range(2))
    return all(torch.equal(gradient, second.gradients()[name]) for name, gradient in first.gradients().items())


def test_repeating_a_sharded_call_repeats_every_bit():
    assert all(run_ranks(same_bits_twice, 2))


def refused_messages(rank: int) -> list[str]:
    case = on_shard(cases()[0], rank, SHARDS["two even"])
    messages = []
    for change in ({"vocab_size": None}, {"vocab_start": -1}):
        try:
            mixture_cross_entropy(
                case.hidden,
                case.heads,
                case.gate_logits,
                case.target,
                group=dist.group.WORLD,
                **(case.options | change),
            )
        except InputError as error:
            messages.append(str(error))
    return messages


def test_a_sharded_call_must_say_how_large_the_vocabulary_is():
    for messages in run_ranks(refused_messages, 2):
        assert messages[0].startswith("vocab_size: needed when the heads are sharded over a group (this one has 2 ranks)")
        assert messages[1].startswith("vocab_start: -1")
