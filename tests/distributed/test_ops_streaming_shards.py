"""The streaming backend over two ranks equals one process, through Triton's interpreter.

Triton decides at import whether it interprets, so these ranks are started with the variable set, not forked from a
server that may have imported Triton already.
"""

from __future__ import annotations

import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.mixture_cases import Case, answer_of, make_case, relative_error, truth

NEEDS = [(True, True, True), (True, False, False)]  # gate, hidden, heads
CASES = [
    make_case(31, rows=23, vocab=53, widths=(4, 6, 3), padding=1, **options)
    for options in (
        {"reduction": "mean"},
        {"reduction": "none", "label_smoothing": 0.1, "z_loss": 0.01},
        {"reduction": "sum", "logit_scale": 1e4},
    )
]


def on_shard(case: Case, rank: int) -> Case:
    heads = [head[27 * rank : 27 * (rank + 1)] for head in case.heads]
    return Case(case.hidden, heads, case.gate_logits, case.target, case.options | {"vocab_start": 27 * rank})


def rank_answers(rank: int, store: str, cases: list[Case]) -> list[dict[str, Any]]:
    from gpu_arithmetic import teach_gpu_arithmetic

    from ultrafuser_mega.ops import streaming
    from ultrafuser_mega.ops.problem import checked_problem

    teach_gpu_arithmetic()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    defaults = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "group": dist.group.WORLD}

    def loss(*tensors: Any, **options: Any) -> Any:
        return streaming.mixture_loss(checked_problem(*tensors, **(defaults | options)))[0]

    answers = [answer_of(loss, on_shard(case, rank), needs) for case, needs in itertools.product(cases, NEEDS)]
    dist.barrier()
    dist.destroy_process_group()
    # tensors cannot outlive the process that made them
    return [{"loss": a.loss.tolist()} | {name: g.tolist() for name, g in a.gradients().items()} for a in answers]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, torch.Tensor]]]:
    pytest.importorskip("triton")
    store: Path = tmp_path_factory.mktemp("store") / "gloo"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            answers = [pool.submit(rank_answers, rank, str(store), CASES) for rank in range(2)]
            lists = [answer.result() for answer in answers]
    return [[{name: torch.tensor(value) for name, value in answer.items()} for answer in rank] for rank in lists]


def test_two_shards_equal_one_process(ranks: Any) -> None:
    """In fp32: 1e-5 is a few dozen roundings; logits of 1e4 lose 1e-3 of a probability to begin with."""
    for index, (case, needs) in enumerate(itertools.product(CASES, NEEDS)):
        true, parts = truth(case), [rank[index] for rank in ranks]
        tolerance = 1e-2 if case is CASES[2] else 1e-5
        assert torch.equal(parts[0]["loss"], parts[1]["loss"]) and torch.equal(parts[0]["gate"], parts[1]["gate"])
        assert relative_error(parts[0]["loss"], true.loss) <= 1e-5
        assert relative_error(parts[0]["gate"], true.gate) <= tolerance
        for j in range(3 if needs == NEEDS[0] else 0):
            total = parts[0][f"hidden[{j}]"] + parts[1][f"hidden[{j}]"]
            assert relative_error(total, true.hidden[j]) <= tolerance
            heads = torch.cat([part[f"heads[{j}]"] for part in parts])
            assert relative_error(heads, true.heads[j]) <= tolerance
