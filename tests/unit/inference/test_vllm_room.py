"""Which requests begin with a step of the vLLM engines, and where these are placed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.devices import places_of
from ultrafuser_mega.inference.model import described_model
from ultrafuser_mega.inference.vllm.placing import Placing, jobs_of
from ultrafuser_mega.inference.vllm.room import Room, Rooms


def rooms(rows: int = 8) -> Rooms:
    return Rooms({"text": Room(10, 16, 100), "math": Room(6, 32, 50)}, rows)


def prompt(text: int, math: int) -> dict[str, list[int]]:
    return {"text": [1] * text, "math": [1] * math}


def test_a_request_begins_where_every_specialist_has_blocks_for_prompt_and_answer() -> None:
    own = rooms()
    own.begin_step()
    assert own.take("a", prompt(30, 20), 100)  # 9 of text's 10 blocks, 4 of math's 6
    assert not own.take("b", prompt(1, 1), 16)  # two blocks of text
    assert own.take("c", prompt(1, 1), 15)
    assert {name: room.free for name, room in own.of.items()} == {"text": 0, "math": 32}
    own.leave("a")
    own.begin_step()
    assert own.take("b", prompt(1, 1), 16)


def test_a_step_reads_the_prompts_that_begin_whole_beside_a_token_of_every_answer() -> None:
    own = rooms()
    own.begin_step()
    assert own.take("a", prompt(5, 49), 1)
    assert not own.take("b", prompt(5, 2), 1)  # math's step has room for one
    own.begin_step()
    assert own.take("b", prompt(5, 49), 1)  # and a token of a
    own.begin_step()
    assert not own.take("c", prompt(5, 49), 1)


def test_no_more_rows_than_wanted_are_under_way() -> None:
    own = rooms(rows=1)
    own.begin_step()
    assert own.take("a", prompt(1, 1), 1)
    assert not own.take("b", prompt(1, 1), 1)


def test_places_are_one_for_all_or_one_each_and_may_be_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    names = ["text", "code", "math"]
    assert places_of("auto", names) == {"text": [0], "code": [1], "math": [2]}
    assert places_of("cuda:1", names) == {name: [1] for name in names}
    assert places_of("cuda:0+cuda:3,cpu,cuda:2", names) == {"text": [0, 3], "code": [None], "math": [2]}
    assert places_of("cpu+cpu", names) == {name: [None, None] for name in names}
    for wrong in ("cuda:4", "cuda:0+cuda:0", "cuda:0+cpu", "cuda:0,cuda:1", "tpu", ""):
        with pytest.raises(InputError, match="--device"):
            places_of(wrong, names)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert places_of("auto", names) == {name: [None] for name in names}


def test_each_engine_is_told_its_share_without_any_weight_being_read(releases: Any) -> None:
    folder = releases["llamas"]
    with described_model(str(folder), "bf16") as described:
        folders = {name: Path(name) for name in described.model.names}
        jobs = jobs_of(described.model, folders, Placing("cpu,cpu+cpu,cpu", rows=2, memory=0.0002))
        assert described.tokenizer("a")["input_ids"]
    assert {name: (job.dtype, job.rows, len(job.devices)) for name, job in jobs.items()} == {
        "text": ("bfloat16", 2, 1),
        "code": ("bfloat16", 2, 2),
        "math": ("bfloat16", 2, 1),
    }
    assert [job.positions for job in jobs.values()] == [256, 257, 258]
    assert all(job.step_tokens == job.positions + 2 for job in jobs.values())
    spent = sum(job.cache_bytes * len(job.devices) for job in jobs.values() if job.cache_bytes)
    assert spent > 0.0002 * 2**30  # and the block of each that stands for none


def test_specialists_that_share_a_gpu_need_to_be_told_how_much_they_may_take(
    releases: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with (
        described_model(str(releases["llamas"]), None) as described,
        pytest.raises(InputError, match="--memory: give it, as specialists share cuda:0"),
    ):
        jobs_of(described.model, {name: Path(name) for name in described.model.names}, Placing())
