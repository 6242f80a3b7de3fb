"""Merged folders hold what numpy adds up in float64, load in transformers, and say how they were made."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.branched import branched_tree, write_branched
from support.command import ultrafuser
from support.trio import PIECES
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from ultrafuser_mega.baselines.ingredients import Ingredients
from ultrafuser_mega.baselines.merging import write_combination
from ultrafuser_mega.config import load_config
from ultrafuser_mega.convert.shards import check_hashes
from ultrafuser_mega.data.store import TokenStore

NAMES = ("text", "code", "math")
#: An interpreter that has mergekit, for the tests that compare with it.
MERGEKIT = os.environ.get("ULTRAFUSER_MERGEKIT", "")


@pytest.fixture(scope="module")
def branched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_branched(tmp_path_factory.mktemp("branched"))


@pytest.fixture
def config(branched: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(branched_tree(branched, tmp_path / "runs"), sort_keys=False))
    return path


def tensors(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """In float64, without vocabulary rows beyond the shared ones."""
    loaded = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    crop = {name: value[:PIECES] if value.shape[0] > PIECES else value for name, value in loaded.items()}
    return {name: value.double().numpy() for name, value in crop.items()}


def test_average_is_numpys_in_float64_rounded_once(
    branched: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert ultrafuser(monkeypatch, "baseline", "average", "--config", config, "--out", out) == 0, capsys.readouterr()
    parts = [tensors(branched / name) for name in NAMES]
    merged = tensors(out)
    assert merged.keys() == parts[0].keys()
    for name, value in merged.items():
        expected = np.mean([part[name] for part in parts], axis=0).astype(np.float32)
        # float64 sums in another order may round to float32's neighbour: half a step is 2^-24, one step twice that.
        np.testing.assert_allclose(value, expected, rtol=2**-23, atol=0, err_msg=name)
    check_hashes(out)
    made = json.loads((out / "baseline.json").read_text())
    assert made["baseline"] == "average" and made["settings"]["weights"] == {"text": 1.0, "code": 1.0, "math": 1.0}
    assert load_config(out / "config.yaml").name == "run"
    assert "averaged" in (out / "README.md").read_text()


def test_losses_of_a_merge_are_those_that_transformers_computes_alone(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert ultrafuser(monkeypatch, "baseline", "average", "--config", config, "--out", out, "--of", "math,text") == 0
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    store = TokenStore.open(load_config(config).store_dir)
    summary = json.loads((out / "summary.json").read_text())
    for name in NAMES:
        losses = []
        for sample in [store.split(name, "heldout")[index] for index in range(2)]:
            turns = zip(sample.prompts_of("math"), sample.responses, strict=True)
            ids = np.concatenate([part for turn in turns for part in turn])
            count = sample.response_tokens  # one turn
            whole = torch.from_numpy(ids.astype(np.int64))
            with torch.no_grad():
                logits = model(input_ids=whole[None]).logits[0, -count - 1 : -1]
            losses += cross_entropy(logits, whole[-count:], reduction="none").tolist()
        assert summary["eval"][name]["fused"] == pytest.approx(np.mean(losses), rel=1e-5)  # fp32 logits of order 1
    tokenizer = AutoTokenizer.from_pretrained(out)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "### Instruction:\nHi" in asked  # math's, which was named first


def test_task_arithmetic_adds_the_differences_to_the_base(
    branched: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--config", config, "--base", branched / "base", "--scale", 0.4, "--no-losses"]
    out = tmp_path / "out"
    assert ultrafuser(monkeypatch, "baseline", "task-arithmetic", *arguments, "--out", out) == 0
    base, parts = tensors(branched / "base"), [tensors(branched / name) for name in NAMES]
    for name, value in tensors(out).items():
        expected = base[name] + 0.4 * sum(part[name] - base[name] for part in parts)
        # Of sums of numbers up to 5 that are rounded to float32 once.
        np.testing.assert_allclose(value, expected, rtol=2**-23, atol=5 * 2**-52, err_msg=name)
    assert not (out / "summary.json").exists()


@pytest.mark.parametrize("tie", [False, True])
def test_bf16_models_leave_as_bf16_in_several_shards(tmp_path: Path, tie: bool) -> None:
    root = write_branched(tmp_path / "models", torch.bfloat16, tie)
    ingredients = Ingredients.of({name: root / name for name in NAMES})
    assert ingredients.tied == tie
    (tmp_path / "out").mkdir()
    coefficients = {"text": 0.5, "code": 0.25, "math": 0.25}
    write_combination(tmp_path / "out", ingredients, lambda tensor: coefficients, shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    merged, parts = tensors(tmp_path / "out"), {name: tensors(root / name) for name in NAMES}
    assert ("lm_head.weight" in merged) != tie
    for name, value in merged.items():
        exact = torch.from_numpy(sum(c * parts[part][name] for part, c in coefficients.items()))
        assert torch.equal(torch.from_numpy(value), exact.bfloat16().double()), name  # exact: 8 bits times quarters


def test_what_cannot_be_merged_is_refused_in_one_line(
    branched: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*arguments: object) -> str:
        assert ultrafuser(monkeypatch, "baseline", *arguments, "--config", config, "--out", tmp_path / "out") == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and not (tmp_path / "out").exists()
        return lines[0]

    assert "'maths' is no specialist" in refusal("average", "--of", "text,maths")
    assert "'text' stands twice" in refusal("average", "--of", "text,text")
    assert "weights of an average" in refusal("average", "--of", "text=0,math=0")
    assert "'nan' is no number" in refusal("average", "--of", "text=nan,math=1")
    assert "--scale nan" in refusal("task-arithmetic", "--base", branched / "base", "--scale", "nan")
    assert "--density 2" in refusal("ties", "--base", branched / "base", "--density", 2, "--mergekit", "/bin/true")
    assert "has no mergekit" in refusal("dare", "--base", branched / "base")
    other = shutil.copytree(branched / "math", tmp_path / "other")
    fields = json.loads((other / "config.json").read_text())
    AutoModelForCausalLM.from_config(LlamaConfig(**(fields | {"num_key_value_heads": 4}))).save_pretrained(other)
    capsys.readouterr()
    told = refusal("average", f"specialists.math.path={other}")
    assert "model.layers.0.self_attn.k_proj.weight is (16, 32) in text and (32, 32) in math" in told


def test_what_models_compute_with_beside_tensors_is_the_firsts_and_told(branched: Path, tmp_path: Path) -> None:
    other = shutil.copytree(branched / "math", tmp_path / "other")
    fields = json.loads((other / "config.json").read_text())
    fields["rope_parameters"]["rope_theta"] = 1e6
    (other / "config.json").write_text(json.dumps(fields))
    ingredients = Ingredients.of({"text": branched / "text", "math": other})
    assert ingredients.notices == ("rope_theta is 10000.0 for text and 1000000.0 for math; that of text is kept",)


@pytest.mark.slow
@pytest.mark.skipif(not MERGEKIT, reason="ULTRAFUSER_MERGEKIT names no interpreter that has mergekit")
@pytest.mark.parametrize("method", ["average", "task-arithmetic"])
def test_merges_equal_mergekits(branched: Path, tmp_path: Path, method: str) -> None:
    from ultrafuser_mega.baselines.mergekit import write_merge
    from ultrafuser_mega.baselines.merging import average_coefficients, task_coefficients

    weights = {"text": 2.0, "code": 1.0, "math": 1.0}
    names = (*weights, "base") if method == "task-arithmetic" else tuple(weights)
    ingredients = Ingredients.of({name: branched / name for name in names})
    for place in ("ours", "theirs"):
        (tmp_path / place).mkdir()
    write_merge(tmp_path / "theirs", ingredients, method, weights, {}, 0.5, 1, Path(MERGEKIT))
    coefficients = average_coefficients(weights) if method == "average" else task_coefficients(weights, 0.5)
    write_combination(tmp_path / "ours", ingredients, lambda tensor: coefficients)
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():  # theirs in float32: four roundings of numbers up to 5
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=4 * 5 * 2**-24, err_msg=name)


@pytest.mark.slow
@pytest.mark.skipif(not MERGEKIT, reason="ULTRAFUSER_MERGEKIT names no interpreter that has mergekit")
@pytest.mark.parametrize("method", ["ties", "dare"])
def test_ties_and_dare_come_from_mergekit(
    branched: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    out = tmp_path / "out"
    arguments = ["--config", config, "--base", branched / "base", "--mergekit", MERGEKIT, "--density", 0.5]
    assert ultrafuser(monkeypatch, "baseline", method, *arguments, "--out", out) == 0
    base, merged = tensors(branched / "base"), tensors(out)
    change = np.concatenate([(merged[name] - base[name]).ravel() for name in base])
    assert 0.01 < change.std() < 0.1  # three changes of 0.02 each, half of them kept
    assert json.loads((out / "summary.json").read_text())["eval"]["mean"]["fused"] > 0
    assert not [path for path in out.iterdir() if path.name in ("merged", "cropped")]
