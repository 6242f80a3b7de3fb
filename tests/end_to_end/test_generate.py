"""``ultrafuser generate`` and ``ultrafuser chat`` over a checkpoint and over the release folder exported from it."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.command import ultrafuser
from support.trio import ONE, config_tree
from transformers import AutoModelForCausalLM, AutoTokenizer

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.model import choose_devices, opened_model

PROMPT = "What is 12 plus 30?"
STEPS = 12


@pytest.fixture(scope="module")
def models(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same untrained fused model as a checkpoint and as a release folder."""
    root = tmp_path_factory.mktemp("models")
    (root / "run.yaml").write_text(yaml.safe_dump(config_tree(trio, root / "runs", ONE), sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        assert ultrafuser(patch, "import", root / "run.yaml", root / "checkpoint") == 0
        assert ultrafuser(patch, "export", root / "checkpoint", root / "release") == 0
    return {"checkpoint": root / "checkpoint", "release": root / "release"}


@pytest.fixture(scope="module")
def transformers_model(models: Any) -> Any:
    folder = models["release"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Calls the command; returns exit code, standard output and standard error."""

    def call(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = ultrafuser(monkeypatch, *arguments)
        return code, *capsys.readouterr()

    return call


def test_a_checkpoint_opens_as_the_model_that_its_export_is(models: Any) -> None:
    with (
        opened_model(str(models["checkpoint"]), "cpu", None) as ours,
        opened_model(str(models["release"]), "cpu", None) as theirs,
    ):
        before, after = ours.model.state_dict(), theirs.model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key].to_dense(), after[key].to_dense()) for key in before)
        assert ours.eos == theirs.eos
        assert ours.tokenizer("a b").input_ids == theirs.tokenizer("a b").input_ids


@pytest.mark.parametrize("kind", ["checkpoint", "release"])
def test_generate_prints_what_the_release_answers_in_transformers(
    models: Any, transformers_model: Any, run: Any, kind: str
) -> None:
    model, tokenizer = transformers_model
    expected = model.chat([{"role": "user", "content": PROMPT}], tokenizer=tokenizer, max_new_tokens=STEPS)
    assert run("generate", models[kind], PROMPT, "-n", STEPS)[:2] == (0, expected + "\n")
    assert run("generate", models[kind], "-n", STEPS, stdin=PROMPT)[:2] == (0, expected + "\n")


def test_raw_text_is_continued_as_generate_continues_it(models: Any, transformers_model: Any, run: Any) -> None:
    model, tokenizer = transformers_model
    ids = tokenizer(PROMPT, return_tensors="pt")
    sequence = model.generate(**ids, max_new_tokens=STEPS)[0]
    whole = tokenizer.decode(sequence, skip_special_tokens=True)
    _, found, _ = run("generate", models["release"], PROMPT, "--raw", "-n", STEPS)
    assert PROMPT + found.removesuffix("\n") == whole


def test_a_file_of_prompts_is_answered_in_a_batch(
    models: Any, transformers_model: Any, run: Any, trio: Path, tmp_path: Path
) -> None:
    model, tokenizer = transformers_model
    options = ("--output", tmp_path / "out.jsonl", "--gate-trace", tmp_path / "gate.jsonl", "-n", STEPS)
    code, out, _ = run("generate", models["checkpoint"], "--input", trio / "data" / "math.heldout.jsonl", *options)
    assert (code, out) == (0, f"wrote {tmp_path / 'out.jsonl'}: 12 answers\n")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    questions = [[{"role": "user", "content": row["instruction"]}] for row in rows]
    assert [row["generated"] for row in rows] == model.chat(questions, tokenizer=tokenizer, max_new_tokens=STEPS)
    assert len((tmp_path / "gate.jsonl").read_text().splitlines()) == 12


def test_a_stop_string_ends_the_answer_before_it(models: Any, run: Any) -> None:
    _, whole, _ = run("generate", models["release"], PROMPT, "-n", STEPS)
    stop = whole[4:6]
    _, cut, _ = run("generate", models["release"], PROMPT, "-n", STEPS, "--stop", stop)
    assert cut == whole[: whole.index(stop)] + "\n"


def test_chat_reads_lines_until_they_end(models: Any, transformers_model: Any, run: Any) -> None:
    model, tokenizer = transformers_model
    messages = [{"role": "user", "content": PROMPT}]
    first = model.chat(messages, tokenizer=tokenizer, max_new_tokens=STEPS)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "Why?"}]
    second = model.chat(messages, tokenizer=tokenizer, max_new_tokens=STEPS)
    code, out, _ = run("chat", models["release"], "-n", STEPS, stdin=f"{PROMPT}\nWhy?\n")
    assert code == 0
    assert first + "\n" in out and second + "\n" in out.partition(first)[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "hi"), "nowhere: no such folder; expected a release, a checkpoint"),
        (("{trio}/data", "hi"), "data: no config.json; expected what ultrafuser export wrote, a checkpoint"),
        (("{release}", " "), "the prompt is empty"),
        (("{release}", "hi", "--raw", "--system", "x"), "--system: --raw uses no templates"),
        (("{release}", "hi", "--gate-trace", "{trio}"), "exists already; nothing is overwritten"),
        (("{release}", "--input", "in.jsonl"), "--input and --output belong together"),
        (("{release}", "caf\udcff"), "the prompt is not UTF-8 at character 3"),
        (
            ("{release}", "--input", "{trio}/data/math.heldout.jsonl", "--output", "a", "--gate-trace", "./a"),
            "both are a; give two files",
        ),
        (("{release}", "hi", "--temperature", "1e-9"), "--temperature 1e-09: expected 0 (greedy) or 0.001 or more"),
        (("{release}", "hi", "--stop", ""), "--stop: the empty string"),
        (("{release}", "hi", "-n", "0"), "--max-new-tokens 0: expected 1 or more"),
        (("{release}", "hi", "--device", "tpu"), "--device tpu: 'tpu': expected auto, cpu, cuda:N"),
        (("{release}", "hi", "--device", "cpu,cpu"), "--device cpu,cpu: names 2 places"),
        (("{release}", "hi", "--dtype", "int4"), "--dtype int4: expected one of fp32, bf16, fp16"),
    ],
)
def test_bad_input_is_one_line(models: Any, trio: Path, run: Any, arguments: Any, message: Any) -> None:
    filled = [argument.format(trio=trio, release=models["release"]) for argument in arguments]
    code, out, err = run("generate", *filled)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_an_element_type_that_does_not_hold_a_value_is_refused_by_the_tensor(
    trio: Path, run: Any, tmp_path: Path
) -> None:
    tree = config_tree(Path(shutil.copytree(trio, tmp_path / "trio")), tmp_path / "runs", ONE)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    weights = tmp_path / "trio" / "code" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][5] = -1e5
    save_file(tensors, weights, metadata={"format": "pt"})
    assert run("import", tmp_path / "run.yaml", tmp_path / "checkpoint")[0] == 0
    assert run("export", tmp_path / "checkpoint", tmp_path / "release", "--no-verify")[0] == 0
    for folder in (tmp_path / "checkpoint", tmp_path / "release"):
        code, _, err = run("generate", folder, PROMPT, "--dtype", "fp16")
        named = f"{folder}: tensor specialists.code.model.norm.weight"
        expected = "its largest value, 100000, is beyond float16, which ends at 65504; use fp32 or bf16"
        assert (code, err.splitlines()[-1]) == (2, f"error: {named}: {expected}")  # behind a bar of loading, perhaps


@pytest.mark.parametrize(("gpus", "expected"), [(0, "cpu cpu cpu"), (2, "cuda:0 " * 3), (3, "cuda:0 cuda:1 cuda:2")])
def test_every_specialist_gets_a_gpu_where_there_are_enough(
    monkeypatch: pytest.MonkeyPatch, gpus: Any, expected: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert [str(device) for device in choose_devices("auto", list("abc")).values()] == expected.split()


def test_devices_are_one_for_all_or_one_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    names = ["text", "code", "math"]
    assert [str(device) for device in choose_devices("cuda:1", names).values()] == ["cuda:1"] * 3
    assert [str(device) for device in choose_devices("cuda:2,cpu,cuda:0", names).values()] == [
        "cuda:2",
        "cpu",
        "cuda:0",
    ]
    with pytest.raises(InputError, match=r"--device cuda:3: .* this machine has 3 GPUs"):
        choose_devices("cuda:3", names)
    with pytest.raises(InputError, match=r"--device cuda:0\+cuda:1: only --engine vllm spreads one specialist"):
        choose_devices("cuda:0+cuda:1", names)
