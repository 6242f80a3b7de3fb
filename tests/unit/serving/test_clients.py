"""Clients that people have, against an engine that computes."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from support.live_server import LiveServer

QUESTION: list[Any] = [{"role": "user", "content": "Which city is the largest?"}]
# Without single bytes, whose text may change with those that follow.
BYTES = {str(token): -100 for token in range(3, 259)}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "logit_bias": BYTES}


@pytest.fixture(scope="module")
def said(computing: LiveServer) -> str:
    """The greedy answer to the question."""
    answer = computing.ask("/v1/chat/completions", {"messages": QUESTION, **GREEDY})[1]
    return answer["choices"][0]["message"]["content"]


def test_openais_client(computing: LiveServer, said: str) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{computing.url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["toy"]
        whole = client.chat.completions.create(
            model="toy",
            messages=QUESTION,
            logprobs=True,
            top_logprobs=3,
            n=2,
            extra_body={"gate_weights": True},
            **GREEDY,
        )
        assert [choice.message.content for choice in whole.choices] == [said, said]
        content = whole.choices[0].logprobs.content
        assert len(content) == whole.usage.completion_tokens // 2 and len(content[0].top_logprobs) == 3
        assert content[0].token == content[0].top_logprobs[0].token
        assert whole.choices[0].gate_weights["specialists"] == ["text", "code", "math"]
        stream = client.chat.completions.create(
            model="toy", messages=QUESTION, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == said
        assert chunks[-1].usage.completion_tokens == len(content)
        text = client.completions.create(model="toy", prompt="London is", echo=True, logprobs=2, **GREEDY)
        assert text.choices[0].text.startswith("London is")
        assert len(text.choices[0].logprobs.tokens) == len(text.choices[0].logprobs.token_logprobs)
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["Rome", "London"]}}}
        held = client.chat.completions.create(model="toy", messages=QUESTION, response_format=form)
        assert json.loads(held.choices[0].message.content) in ("Rome", "London")
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="toy", messages=QUESTION, tools=[{"type": "function"}])
        assert refused.value.param == "tools"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="gpt-9", messages=QUESTION)


def test_openais_asynchronous_client(computing: LiveServer, said: str) -> None:
    openai = pytest.importorskip("openai")

    async def answers() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{computing.url}/v1", api_key="none") as client:

            async def one() -> str:
                text = ""
                stream = await client.chat.completions.create(model="toy", messages=QUESTION, stream=True, **GREEDY)
                async for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
                return text

            return await asyncio.gather(*(one() for _ in range(6)))

    assert asyncio.run(answers()) == [said] * 6


def test_litellm(computing: LiveServer, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask a server elsewhere for prices
    litellm = pytest.importorskip("litellm")
    where = {"model": "openai/toy", "api_base": f"{computing.url}/v1", "api_key": "none", "messages": QUESTION}
    assert litellm.completion(**where, **GREEDY).choices[0].message.content == said
    parts = litellm.completion(**where, **GREEDY, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == said
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**{**where, "messages": [{"role": "user", "content": "so " * 400}]})


def test_langchains_chat(computing: LiveServer, said: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(
        model="toy",
        base_url=f"{computing.url}/v1",
        api_key="none",
        temperature=0,
        max_tokens=12,
        logit_bias=BYTES,
        stream_usage=True,
    )
    asked = [("system", ""), ("human", QUESTION[0]["content"])]
    answer = chat.invoke(asked)
    assert answer.content == said and answer.usage_metadata["input_tokens"] > 0
    assert "".join(part.content for part in chat.stream(asked)) == said
    assert [one.content for one in chat.batch([asked, asked])] == [said, said]


def test_curl(computing: LiveServer, said: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    url, body = f"{computing.url}/v1/chat/completions", json.dumps({"messages": QUESTION, "stream": True, **GREEDY})
    command = ["curl", "-sN", url, "-H", "Content-Type: application/json", "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    assert lines[-2] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == said


TASK = """
    task: served_toy
    dataset_path: json
    dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
    test_split: test
    output_type: KIND
    doc_to_text: "{{question}}"
    doc_to_target: "{{answer}}"
    doc_to_choice: ["Rome", "London"]
    generation_kwargs: {max_gen_toks: 4, until: ["."], temperature: 0}
    metric_list: [{metric: METRIC}]
"""


@pytest.mark.parametrize(
    ("model", "kind", "metric"),
    [
        ("local-completions", "multiple_choice", "acc"),
        ("local-completions", "generate_until", "exact_match"),
        ("local-chat-completions", "generate_until", "exact_match"),
    ],
)
def test_lm_evaluation_harness(
    computing: LiveServer, releases: dict[str, Path], tmp_path: Path, model: str, kind: str, metric: str
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity", reason="pip install 'lm-eval[api]'")
    from lm_eval.tasks import TaskManager

    rows = [{"question": "Which city is the largest?", "answer": "London"}, {"question": "London,", "answer": "Rome"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = textwrap.dedent(TASK).replace("FOLDER", str(tmp_path)).replace("KIND", kind).replace("METRIC", metric)
    if kind != "multiple_choice":
        task = "\n".join(line for line in task.splitlines() if "doc_to_choice" not in line)
    (tmp_path / "served_toy.yaml").write_text(task)
    chat = model == "local-chat-completions"
    url = f"{computing.url}/v1/{'chat/' if chat else ''}completions"
    arguments = f"model=toy,base_url={url},num_concurrent=2,max_retries=1,max_length=200"
    if not chat:
        arguments += f",tokenizer={releases['llamas']},trust_remote_code=True"
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path / "cache")
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=["served_toy"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=chat,
        bootstrap_iters=0,
        log_samples=True,
    )
    assert f"{metric},none" in found["results"]["served_toy"]
    samples = found["samples"]["served_toy"]
    assert len(samples) == 2
    if kind == "multiple_choice":  # as the log-likelihoods are by the echo of this server itself
        sample = samples[1]
        score = sample["resps"][1][0][0]
        body = {"prompt": "London, London", "echo": True, "logprobs": 1, "max_tokens": 1}
        body["add_special_tokens"] = False
        lists = computing.ask("/v1/completions", body)[1]["choices"][0]["logprobs"]
        before = len(computing.ask("/tokenize", {"prompt": "London,", "add_special_tokens": False})[1]["tokens"])
        assert score == pytest.approx(sum(lists["token_logprobs"][before:-1]), abs=1e-3)


LOCUST = """
    from locust import HttpUser, task

    class Reader(HttpUser):
        @task
        def ask(self):
            body = {"messages": [{"role": "user", "content": "Which city?"}], "max_tokens": 4, "stream": True}
            with self.client.post("/v1/chat/completions", json=body, stream=True, catch_response=True) as response:
                lines = [line for line in response.iter_lines() if line]
                if lines[-1] != b"data: [DONE]":
                    response.failure("no end")
"""


def test_locust(computing: LiveServer, tmp_path: Path) -> None:
    if importlib.util.find_spec("locust") is None:  # importing it here would exchange this process's threads
        pytest.skip("needs locust")
    (tmp_path / "users.py").write_text(textwrap.dedent(LOCUST))
    options = ["--headless", "-u", "4", "-r", "4", "-t", "3s", "--host", computing.url, "--only-summary", "--json"]
    command = [sys.executable, "-m", "locust", "-f", "users.py", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (figures,) = json.loads(done.stdout)
    assert figures["num_requests"] > 0 and figures["num_failures"] == 0
