"""Programs that know one chat template and nothing of specialists: they give each its own, or are told once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.release_folder import write_release
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from ultrafuser_mega.release.modeling_ultrafuser import UltraFuserForCausalLM

QUESTION = [{"role": "user", "content": "Which city is the largest?"}]
OTHER = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Janet has 3 apples."},
]
TOLD = "a conversation in text's chat template"


@pytest.fixture
def tokenizer(release: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(release)


@pytest.fixture
def fresh(release: Path) -> UltraFuserForCausalLM:
    """A model that has warned of nothing yet."""
    return UltraFuserForCausalLM.from_pretrained(release).eval()


@pytest.fixture(autouse=True)
def heard() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def told(heard: list[warnings.WarningMessage]) -> int:
    return sum(TOLD in str(one.message) for one in heard)


def test_the_pipeline_gives_every_specialist_its_own_prompt(
    release: Path, model: Any, tokenizer: Any, heard: list[warnings.WarningMessage]
) -> None:
    pipe = pipeline("text-generation", str(release), trust_remote_code=True)
    options = {"max_new_tokens": 8, "do_sample": False}
    wanted = [model.chat(asked, tokenizer=tokenizer, **options) for asked in (QUESTION, OTHER)]
    lead = model.config.response_lead
    assert pipe(QUESTION, **options)[0]["generated_text"][-1]["content"].removeprefix(lead) == wanted[0]
    both = pipe([QUESTION, OTHER], batch_size=2, **options)
    assert [one[0]["generated_text"][-1]["content"].removeprefix(lead) for one in both] == wanted
    ids = tokenizer("London is", return_tensors="pt")["input_ids"]
    raw = tokenizer.decode(model.generate(ids, **options)[0], skip_special_tokens=True)
    assert pipe("London is", **options)[0]["generated_text"] == raw
    assert told(heard) == 0


def test_a_saved_model_keeps_its_pipeline(release: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(release, trust_remote_code=True)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(release, trust_remote_code=True).save_pretrained(tmp_path)
    pipe = pipeline("text-generation", str(tmp_path), trust_remote_code=True)
    assert type(pipe).__name__ == "UltraFuserPipeline"


@pytest.mark.parametrize("conversation", [QUESTION, OTHER])
def test_generating_from_one_template_for_all_is_told_once(
    fresh: Any, tokenizer: Any, heard: list[warnings.WarningMessage], conversation: Any
) -> None:
    inputs = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_tensors="pt")
    for _ in range(2):
        fresh.generate(**inputs, max_new_tokens=3)
    assert told(heard) == 1
    (message,) = [str(one.message) for one in heard if TOLD in str(one.message)]
    assert "model.chat(messages, tokenizer=tokenizer)" in message
    assert ("code, math learnt" if "code" in different(fresh) else "math learnt") in message


def different(model: Any) -> list[str]:
    first, *others = model.names
    return [name for name in others if model.config.entry(name)["template"] != model.config.entry(first)["template"]]


def test_scoring_a_response_behind_one_template_for_all_is_told(
    fresh: Any, tokenizer: Any, heard: list[warnings.WarningMessage]
) -> None:
    """As lm-evaluation-harness's ``hf`` does: text of the template, a second BOS, a response behind, padded."""
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    ids = tokenizer([text + " London", text + " Berlin and Rome"], padding=True, return_tensors="pt")
    fresh(**{name: ids[name] for name in ("input_ids", "attention_mask")})
    assert told(heard) == 1


def test_what_is_no_conversation_or_is_each_ones_own_is_not_told(
    fresh: Any, tokenizer: Any, heard: list[warnings.WarningMessage]
) -> None:
    for text in ("London is", "Question: which city?\nAnswer:", "User", "Assistant: User: x"):
        fresh.generate(**tokenizer(text, return_tensors="pt", return_token_type_ids=False), max_new_tokens=2)
    fresh.generate(**fresh.chat_inputs([QUESTION], tokenizer), max_new_tokens=2)
    fresh.chat(OTHER, tokenizer=tokenizer, max_new_tokens=2)
    assert told(heard) == 0


def test_where_all_have_one_template_nobody_is_told(
    specialists: Any, tmp_path: Path, heard: list[warnings.WarningMessage]
) -> None:
    members = {name: (folder, "ultralm") for name, (folder, _) in specialists["llamas"].items()}
    folder = write_release(tmp_path, members)
    model = UltraFuserForCausalLM.from_pretrained(folder).eval()
    assert model.config.chat_marks is None
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")
    model.generate(**inputs, max_new_tokens=2)
    assert told(heard) == 0


def test_the_first_specialists_prompt_may_stand_beside_all_of_them(fresh: Any, tokenizer: Any) -> None:
    own = fresh.chat_inputs([QUESTION, OTHER], tokenizer)
    first = fresh.names[0]
    beside = {
        "input_ids": own["specialist_input_ids"][first],
        "attention_mask": own["specialist_attention_mask"][first],
    }
    assert torch.equal(fresh.generate(**own, max_new_tokens=4), fresh.generate(**own, **beside, max_new_tokens=4))
    with pytest.raises(ValueError, match="not both"):
        fresh.generate(**own, input_ids=beside["input_ids"][:, 1:], max_new_tokens=4)
