"""From training to a folder that others load: train, export, compare, on the command line as people do it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.command import ultrafuser
from support.families import write_family
from support.fresh_process import run_without_this_package
from support.trio import CPU, DISJOINT_8, ONE, PIECES, config_tree, train

from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints, load_checkpoint
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.config import load_config
from ultrafuser_mega.convert.restore import TrainedModel
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.reporting.records import EvaluationResult
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.assembly import make_shard
from ultrafuser_mega.training.prepare import open_store
from ultrafuser_mega.training.trainer import Trainer

LAST = Progress(2, 2)
HELDOUT = 3  # samples of each class
GATE = TrainedModel.gate
TOLERANCE = 1e-5  # of losses up to 10 and gate weights: two orders above what float32 resolves there, 2^-24 * 10


def short_run(trio: Path, runs: Path, layout: dict[str, Any]) -> dict[str, Any]:
    tree = config_tree(trio, runs, layout) | {"microbatch_tokens": 400}
    tree["stage1"] |= {"steps": 1}
    tree["stage2"] |= {"steps": LAST.step}
    tree["evaluation"] = {"samples_per_class": HELDOUT, "token_views": 0}
    tree["data"] |= {"max_length": 400}  # cuts no response
    return tree


# Held-out rows through a release folder, each specialist with its own template, as a user would do it.
LOSSES = """
import json, sys
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()
code = sys.modules[type(model).__module__.rpartition(".")[0] + ".chat_ultrafuser"]
encoder = code.SpecialistEncoder(tokenizer, model.config.entry(model.names[0])["template"])
ending = model.config.response_lead, model.config.eos_token_id
result = []
with torch.no_grad():
    for class_name, row in json.loads(sys.argv[2]):
        messages = [{"role": "user", "content": row["instruction"]}]
        prompts = model.chat_inputs([messages], tokenizer)["specialist_input_ids"]
        response = torch.tensor(encoder.encode_response(row["output"], *ending))
        ids = {name: torch.cat([prompt[0], response[:-1]])[None] for name, prompt in prompts.items()}
        output = model(specialist_input_ids=ids, logits_to_keep=len(response), return_gate_weights=True)
        logits = {"fused": output.logits[0]}
        for name in model.names:
            own = model.specialists[name](input_ids=ids[name]).logits[0, -len(response) :]
            logits[name] = own[:, : model.config.vocab_size]
        generated = model.generate(None, specialist_input_ids=prompts, max_new_tokens=1, do_sample=False)
        assert generated[0, -1] == output.logits[0, 0].argmax()
        losses = {name: cross_entropy(z, response, reduction="none").tolist() for name, z in logits.items()}
        result.append({"class": class_name, "losses": losses, "gate": output.gate_weights[0].tolist()})
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def checkpoint(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run on eight ranks; read only."""
    run = train(short_run(trio, tmp_path_factory.mktemp("runs"), DISJOINT_8), 8)
    progress, path = list_checkpoints(run / "checkpoints")[-1]
    assert progress == LAST
    return path


def test_fused_release_equals_its_checkpoint(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ultrafuser(monkeypatch, "export", checkpoint, tmp_path / "release") == 0
    verified, wrote = capsys.readouterr().out.splitlines()
    assert verified.startswith("verified on a text of ") and wrote == f"wrote {tmp_path / 'release'}"
    assert ultrafuser(monkeypatch, "verify", tmp_path / "release", checkpoint) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["equal"]
    assert [batch["shape"][-1] for batch in result["batches"]] == [PIECES, PIECES]
    tensors = load_file(tmp_path / "release" / "model.safetensors")
    assert tensors["specialists.code.lm_head.weight"].shape[0] == PIECES + 16  # cropped rows are back
    assert tensors["gate.w1.shared"].shape == (64, 64)  # without the units that pad it to six ranks
    assert "text" in (tmp_path / "release" / "README.md").read_text()


def evaluate_again(rank: int, run_dir: Path) -> EvaluationResult:
    """The trainer's evaluation of the run's last checkpoint on one rank, token by token."""
    plan = preflight(load_config(run_dir / "config.yaml", ["layouts=[{kind: colocated}]"]), 1, resume=True)
    assert plan.resume is not None
    groups = make_groups(plan.layout)
    trainer = Trainer(plan, groups, open_store(plan, groups), CPU, make_shard(plan, groups))
    trainer.load()
    load_checkpoint(plan.resume[1], trainer.model, groups, None, 0)
    return trainer.evaluate()


def test_release_has_the_losses_of_the_trainers_own_evaluation(
    trio: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process without this package, from the text of the held-out rows on."""
    run_dir = checkpoint.parent.parent
    (ours,) = run_ranks(evaluate_again, 1, run_dir)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    printed = [record for record in records if record["kind"] == "eval"][-1]["loss"]
    assert ultrafuser(monkeypatch, "export", checkpoint, tmp_path / "release", "--no-verify") == 0
    rows = [
        (name, json.loads(line))
        for name in ("text", "code", "math")
        for line in (trio / "data" / f"{name}.heldout.jsonl").read_text().splitlines()[:HELDOUT]
    ]
    theirs = run_without_this_package(LOSSES, [tmp_path / "release", json.dumps(rows)], tmp_path)

    for sample, other in zip(ours.samples, theirs, strict=True):
        assert sample.class_name == other["class"]
        np.testing.assert_allclose(other["losses"]["fused"], sample.losses, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(other["gate"], sample.weights, rtol=0, atol=TOLERANCE)
    for name in ("text", "code", "math"):
        for model in ("fused", "text", "code", "math"):
            tokens = [loss for other in theirs if other["class"] == name for loss in other["losses"][model]]
            assert np.mean(tokens) == pytest.approx(printed[name][model], abs=TOLERANCE), (name, model)


@pytest.mark.parametrize("name", ["text", "code", "math"])
def test_trained_specialist_leaves_with_its_own_names_and_rows(
    trio: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    out = tmp_path / name
    assert ultrafuser(monkeypatch, "export", checkpoint, out, "--what", f"specialist:{name}") == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (trio / name, out))
    assert {key: t.shape for key, t in after.items()} == {key: t.shape for key, t in before.items()}
    assert not torch.equal(after["lm_head.weight"][:PIECES], before["lm_head.weight"][:PIECES])  # it was trained
    assert torch.equal(after["lm_head.weight"][PIECES:], before["lm_head.weight"][PIECES:])  # these cannot be
    assert (out / "config.json").read_bytes() == (trio / name / "config.json").read_bytes()
    capsys.readouterr()
    assert ultrafuser(monkeypatch, "verify", out, f"{checkpoint}@specialist:{name}") == 0
    assert json.loads(capsys.readouterr().out)["equal"]
    assert ultrafuser(monkeypatch, "verify", out, trio / name) == 1  # no longer what it was


def test_release_with_a_wrong_gate_is_found_by_the_export_itself(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TrainedModel, "gate", lambda self, *wanted: -GATE(self, *wanted))
    assert ultrafuser(monkeypatch, "export", checkpoint, tmp_path / "release") == 1
    printed = capsys.readouterr()
    assert "wrote" not in printed.out
    error = printed.err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / '.release.partial'}: computes something else than {checkpoint} on a ")
    assert [path.name for path in tmp_path.iterdir()] == [".release.partial"]
    assert ultrafuser(monkeypatch, "export", checkpoint, tmp_path / "release", "--resume", "--no-verify") == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'release'}\n"


def test_imported_configuration_is_released_as_it_is(
    trio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = short_run(trio, tmp_path / "runs", ONE)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    start = tmp_path / "start"
    assert ultrafuser(monkeypatch, "import", tmp_path / "run.yaml", start) == 0
    assert ultrafuser(monkeypatch, "export", start, tmp_path / "release") == 0
    specialist = f"{tmp_path / 'release'}@specialist:code"
    assert ultrafuser(monkeypatch, "verify", specialist, trio / "code") == 0


def test_single_folder_goes_in_and_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_family(tmp_path / "source", "qwen2_tied", dtype=torch.bfloat16)
    assert ultrafuser(monkeypatch, "import", source, tmp_path / "checkpoint", "--dtype", "fp32") == 0
    assert "output head tied to the embedding; the checkpoint holds both" in capsys.readouterr().out
    arguments = ("export", tmp_path / "checkpoint", tmp_path / "out", "--what", "specialist:specialist")
    assert ultrafuser(monkeypatch, *arguments) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
    assert ultrafuser(monkeypatch, *arguments) == 2
    assert "out: exists already" in capsys.readouterr().err
