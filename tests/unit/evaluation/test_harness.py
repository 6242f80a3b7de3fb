"""Our model class in lm-evaluation-harness; most of it needs the harness: pip install '.[lm-eval]'."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.evaluation.harness.run import run_harness, write_tasks

CHAT = [{"role": "user", "content": "Is it so?"}]


def asked(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


@pytest.fixture
def harness_model(releases: dict[str, Path]) -> Iterator[Any]:
    """The class over the release of the Qwens."""
    pytest.importorskip("lm_eval")
    from ultrafuser_mega.evaluation.harness.model import UltraFuserLM

    yield UltraFuserLM(str(releases["qwens"]), device="cpu", batch_size="2")


def test_tasks_name_the_folder_of_the_data(tmp_path: Path) -> None:
    write_tasks(tmp_path, tmp_path)
    texts = [path.read_text() for path in tmp_path.glob("*.yaml")]
    assert len(texts) == 5 and not any("{data}" in text for text in texts)
    gsm8k = yaml.safe_load((tmp_path / "ultrafuser_gsm8k.yaml").read_text())
    assert gsm8k["dataset_kwargs"]["data_files"]["test"] == f"{tmp_path}/gsm8k_test.jsonl"


def test_without_the_harness_or_its_data_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ultrafuser_mega.evaluation.harness.run.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"lm-evaluation-harness is not installed; pip install"):
        run_harness([], None)
    monkeypatch.setattr("ultrafuser_mega.evaluation.harness.run.find_spec", lambda name: object())
    with pytest.raises(InputError, match=r"--data .*nowhere: no such folder"):
        run_harness([], tmp_path / "nowhere")


def test_likelihoods_are_those_of_the_released_model(harness_model: Any, models: Any) -> None:
    texts = ["the answer is", "a b c"]
    found = harness_model.loglikelihood([asked(text, " yes it is") for text in texts], disable_tqdm=True)
    for text, (total, _) in zip(texts, found, strict=True):
        whole, context = (harness_model.tok_encode(part) for part in (f"{text} yes it is", text))
        with torch.no_grad():
            logits = models["qwens"](torch.tensor([whole])).logits[0].log_softmax(-1)
        tail = torch.tensor(whole[len(context) :])
        expected = logits[len(context) - 1 : -1].gather(1, tail[:, None]).sum().item()
        assert abs(total - expected) < 1e-3  # a logit of these models is off by less than 1e-4
    (rolling,) = harness_model.loglikelihood_rolling([asked("a b c")], disable_tqdm=True)
    ids = harness_model.tok_encode("a b c")
    with torch.no_grad():
        logits = models["qwens"](torch.tensor([[harness_model.prefix_token_id, *ids]])).logits[0].log_softmax(-1)
    assert abs(rolling - logits[:-1].gather(1, torch.tensor(ids)[:, None]).sum().item()) < 1e-3


def test_conversations_reach_every_specialist_in_its_own_template(
    harness_model: Any, models: Any, releases: Any
) -> None:
    context = harness_model.apply_chat_template(CHAT)
    assert json.loads(context) == CHAT
    tokenizer = harness_model.tokenizer
    answers = harness_model.generate_until([asked(context, {"max_gen_toks": 5, "until": []})], disable_tqdm=True)
    assert answers == [models["qwens"].chat(CHAT, tokenizer=tokenizer, max_new_tokens=5)]
    plain = harness_model.generate_until([asked("a b", {"max_gen_toks": 5, "until": ["zz"]})], disable_tqdm=True)
    ids = torch.tensor([tokenizer("a b")["input_ids"]])
    sequence = models["qwens"].generate(ids, max_new_tokens=5)[0]
    assert plain == [tokenizer.decode(sequence[ids.shape[1] :], skip_special_tokens=True)]
    with pytest.raises(InputError, match="every specialist has its own; give no name"):
        harness_model.chat_template("default")
