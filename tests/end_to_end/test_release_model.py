"""A release folder in a fresh process that cannot import this package: what a user of the folder has.

One child process does everything a user would and writes down what it got; the tests compare with the float64
reference, which reads the same folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fresh_process import run_without_this_package
from support.release_folder import Reference, write_release
from transformers import PreTrainedTokenizerFast

from ultrafuser_mega.release.chat_ultrafuser import decode_response

STEPS = 8
CHILD = """
import contextlib, io, json, re, sys
import torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline

MODEL, again, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(MODEL, trust_remote_code=True)
messages = [{"role": "user", "content": "Which city is the largest?"}]
ids = tokenizer("Which city is the largest?", return_tensors="pt")
result = {"ids": ids.input_ids[0].tolist(), "file": sys.modules[type(model).__module__].__file__}
with torch.no_grad():
    output = model(**ids, return_gate_weights=True)
result["logits"], result["gate_weights"] = output.logits[0].tolist(), output.gate_weights[0].tolist()
result["greedy"] = model.generate(**ids, max_new_tokens=steps, eos_token_id=None)[0].tolist()

inputs = model.chat_inputs([messages], tokenizer)
result["prompts"] = {name: part[0].tolist() for name, part in inputs["specialist_input_ids"].items()}
result["chat"] = model.chat(messages, tokenizer=tokenizer, max_new_tokens=steps)
streamed = io.StringIO()
with contextlib.redirect_stdout(streamed):
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.chat(messages, tokenizer=tokenizer, max_new_tokens=steps, streamer=streamer)
result["streamed"] = streamed.getvalue()
generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
options = {"max_new_tokens": steps, "do_sample": False, "return_full_text": False}
result["pipeline"] = generator("Which city is the largest?", **options)[0]["generated_text"]

model.save_pretrained(again)
tokenizer.save_pretrained(again)
reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
result["names"] = AutoConfig.from_pretrained(again, trust_remote_code=True).names
result["same_again"] = reloaded.chat(messages, tokenizer=tokenizer, max_new_tokens=steps) == result["chat"]

(code,) = re.findall("```python\\n(.*?)```", open(MODEL + "/README.md").read(), re.DOTALL)
shown = io.StringIO()
with contextlib.redirect_stdout(shown):
    exec(code, {"MODEL": MODEL})
result["card"] = shown.getvalue()
result["leaked"] = [name for name in sys.modules if name.split(".")[0] == "ultrafuser_mega"]
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def release(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    specialists = {
        "text": (trio / "text", "ultralm"),
        "code": (trio / "code", "codellama"),
        "math": (trio / "math", "wizardmath"),
    }
    return write_release(tmp_path_factory.mktemp("release") / "fused-model", specialists)


@pytest.fixture(scope="module")
def fresh(release: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the child process got."""
    here = tmp_path_factory.mktemp("elsewhere")
    return run_without_this_package(CHILD, [release, here / "again", STEPS], here)


@pytest.fixture(scope="module")
def reference(release: Any) -> Reference:
    return Reference.load(release)


@pytest.fixture(scope="module")
def tokenizer(release: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(release)


def test_it_runs_on_the_code_in_the_folder_without_this_package(fresh: Any) -> None:
    assert fresh["file"].endswith("modeling_ultrafuser.py") and "modules" in fresh["file"]
    assert not fresh["leaked"]


def test_plain_input_ids_give_the_reference_logits_and_gate_weights(fresh: Any, reference: Any) -> None:
    names = list(reference.specialists)
    logits, weights = reference(dict.fromkeys(names, fresh["ids"]), len(fresh["ids"]))
    atol = reference.rounding()
    torch.testing.assert_close(torch.tensor(fresh["logits"]).double(), logits, atol=atol, rtol=0.0)
    torch.testing.assert_close(torch.tensor(fresh["gate_weights"]).double(), weights, atol=atol, rtol=0.0)


def test_generate_and_chat_give_the_text_of_a_loop_without_cache(fresh: Any, reference: Any, tokenizer: Any) -> None:
    names = list(reference.specialists)
    expected = reference.greedy(dict.fromkeys(names, fresh["ids"]), STEPS)
    assert fresh["greedy"] == fresh["ids"] + expected

    lengths = [len(fresh["prompts"][name]) for name in names]
    assert len(set(lengths)) == len(names), "the prompts must differ in length"
    answer = decode_response(tokenizer, reference.greedy(fresh["prompts"], STEPS, eos=2), " ")
    assert fresh["chat"] == answer
    assert fresh["streamed"].strip() == fresh["chat"].strip()


def test_transformers_pipeline_generates_with_it(fresh: Any, reference: Any, tokenizer: Any) -> None:
    response = reference.greedy(dict.fromkeys(reference.specialists, fresh["ids"]), STEPS, eos=2)
    prompt = tokenizer.decode(fresh["ids"], skip_special_tokens=True)
    whole = tokenizer.decode(fresh["ids"] + response, skip_special_tokens=True)
    assert fresh["pipeline"] == whole.removeprefix(prompt)


def test_what_save_pretrained_writes_loads_in_the_same_way(fresh: Any) -> None:
    assert fresh["same_again"] and fresh["names"] == ["text", "code", "math"]


def test_the_code_in_the_model_card_runs(fresh: Any) -> None:
    number = r"([\d.e-]+)"
    weights = re.findall(rf"\{{'text': {number}, 'code': {number}, 'math': {number}\}}", fresh["card"])
    assert weights
    for token in weights:
        assert sum(map(float, token)) == pytest.approx(1.0, abs=1e-5)
