"""Bad input, as a person gives it on the command line: one line that names it, exit code 2, and no training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from support.trio import COLOCATED_TP2, DISJOINT_3, ONE, PIECES, config_tree, train

from ultrafuser_mega.cli import main
from ultrafuser_mega.toy import tiny_llama, tiny_tokenizer

PROJECT = Path(__file__).parents[2]
PROGRESS = "tokenising"  # how the progress line of data preparation begins


@dataclass
class Case:
    """A copy of the trio to spoil, and the configuration of a run over it."""

    folder: Path
    tree: dict[str, Any]

    @property
    def config(self) -> Path:
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.tree, sort_keys=False))
        return path

    @property
    def runs(self) -> Path:
        return self.folder / "runs"


@pytest.fixture
def case(trio: Path, tmp_path: Path) -> Case:
    shutil.copytree(trio, tmp_path / "trio")
    return Case(tmp_path, config_tree(tmp_path / "trio", tmp_path / "runs", ONE))


@pytest.fixture
def refused(case: Case, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs `ultrafuser COMMAND --config ... ARGUMENTS`; returns the line it is refused with, without "error: "."""

    def run(command: str, *arguments: str) -> str:
        before = files_under(case.runs)
        monkeypatch.setattr(sys, "argv", ["ultrafuser", command, "--config", str(case.config), *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        captured = capfd.readouterr()
        assert end.value.code == 2
        assert captured.out == ""
        assert files_under(case.runs) == before
        return only_error(captured.err)

    return run


def only_error(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if not line.startswith(PROGRESS)]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def files_under(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("command", ["plan", "train"])
def test_missing_specialist_folder(case: Case, refused: Callable[..., str], command: str) -> None:
    shutil.rmtree(case.folder / "trio" / "code")
    message = refused(command, "--ranks", "1")
    assert message.startswith(f"{case.folder / 'trio' / 'code'}: no such folder")


def test_tokenizers_that_disagree(case: Case, refused: Callable[..., str]) -> None:
    tiny_tokenizer(case.folder / "trio" / "code", pieces=PIECES - 10)
    message = refused("train", "--ranks", "1")
    assert message.startswith("tokenizers of text (")
    assert "and code (" in message
    assert "disagree: the piece of id" in message


def test_tensor_parallel_size_that_does_not_divide_the_heads(case: Case, refused: Callable[..., str]) -> None:
    case.tree["layouts"] = [{"kind": "colocated", "tp": 3}]
    message = refused("train", "--ranks", "3")
    assert "tp = 3 does not divide the 4 attention heads of specialist text; tp of 1, 2, 4 would" in message


def test_overlapping_ranks(case: Case, refused: Callable[..., str]) -> None:
    places = {"text": {"tp": 2}, "code": {"first_rank": 1}, "math": {"first_rank": 2}}
    case.tree["layouts"] = [{"kind": "disjoint", "specialists": places}]
    assert "layouts.0: specialists text and code both want rank(s) 1" in refused("train", "--ranks", "3")


def test_rank_count_without_a_layout_lists_what_fits(case: Case, refused: Callable[..., str]) -> None:
    case.tree["layouts"] = [DISJOINT_3, COLOCATED_TP2, ONE]
    assert "none of the configured layouts uses 5 rank(s); launch with 1 or 2 or 3" in refused("train", "--ranks", "5")


@pytest.mark.parametrize("command", ["plan", "prepare", "train"])
def test_unknown_key(case: Case, refused: Callable[..., str], command: str) -> None:
    message = refused(command, "stage2.step=5")
    assert message == f"{case.folder / 'config.yaml'}: unknown key stage2.step; did you mean stage2.steps?"


def test_a_run_that_another_job_trains_is_refused_before_any_rank_starts(
    case: Case, refused: Callable[..., str]
) -> None:
    run_dir = case.runs / "run"
    run_dir.mkdir(parents=True)
    with FileLock(run_dir / ".lock"):
        message = refused("train")
    assert message == f"{run_dir}: another job is training under this name; choose another name"


def test_more_ranks_than_gpus_are_refused_before_any_rank_starts(
    case: Case, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    case.tree["layouts"] = [DISJOINT_3, ONE]
    assert refused("train").startswith("device = auto: every rank needs a GPU of its own: 3 rank(s) on this machine, ")


def test_unknown_template(refused: Callable[..., str]) -> None:
    message = refused("plan", "--ranks", "1", "specialists.code.template=alpaca")
    assert message == (
        "specialists.code.template: 'alpaca' is not known; use one of ultralm, codellama, wizardmath, hf"
    )


def test_specialist_named_like_something_of_torch(case: Case, refused: Callable[..., str]) -> None:
    case.tree["specialists"]["train"] = case.tree["specialists"].pop("text")
    assert "specialists.train: torch keeps the name 'train'" in refused("plan", "--ranks", "1")


def test_microbatches_that_cannot_hold_the_longest_sample(refused: Callable[..., str]) -> None:
    message = refused("plan", "--ranks", "1", "microbatch_tokens=100")
    assert "microbatch_tokens: 100 cannot hold a sample of data.max_length 160; set microbatch_tokens to 160" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("profile.steps=9:12", "profile.steps: 9:12: the run has 5 steps; give some of 1:5"),
        ("report.wandb=fusers", "report.wandb: wandb is not installed; pip install wandb, or leave report.wandb out"),
        (
            "report.prometheus=/nowhere/run.prom",
            "report.prometheus: /nowhere: not a folder that this user can write in",
        ),
    ],
)
def test_numbers_wanted_where_they_cannot_go(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    monkeypatch.setattr("ultrafuser_mega.planning.preflight.find_spec", lambda name: None)
    assert refused("plan", override).startswith(message)


def test_a_profile_of_a_rank_that_the_job_has_not(refused: Callable[..., str]) -> None:
    message = refused("plan", "profile.steps=2", "profile.ranks=[0, 3]")
    assert message == "profile.ranks: 3: the job has ranks 0 to 0"


@pytest.mark.parametrize("command", ["plan", "prepare"])
def test_vocabulary_larger_than_the_smallest_head(refused: Callable[..., str], command: str) -> None:
    assert refused(command, "vocab_size=401", *(["--ranks", "1"] if command == "plan" else [])) == (
        "vocab_size: 401 is more than the 400 rows of the smallest specialist head"
    )


def test_sequences_longer_than_a_specialists_positions(case: Case, refused: Callable[..., str]) -> None:
    edit_config(case.folder / "trio" / "math", max_position_embeddings=128)
    message = refused("plan", "--ranks", "1")
    assert message == "data.max_length: 160 tokens are more than the 128 positions of specialist math"


def test_loss_that_cannot_train_the_second_stage(refused: Callable[..., str]) -> None:
    assert "loss.backend: gate_only cannot train heads in stage 2" in refused(
        "plan", "--ranks", "1", "loss.backend=gate_only"
    )


def test_truncated_weights(case: Case, refused: Callable[..., str]) -> None:
    file = case.folder / "trio" / "math" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert refused("train", "--ranks", "1").startswith(f"{file}: truncated or damaged safetensors file")


def test_weights_of_another_size_than_config_json_says(case: Case, refused: Callable[..., str]) -> None:
    edit_config(case.folder / "trio" / "math", intermediate_size=128)
    message = refused("train", "--ranks", "1")
    assert "tensor model.layers.0.mlp.gate_proj.weight has shape (192, 64), config.json calls for (128, 64)" in message


def test_damaged_settings_of_generation_are_seen_before_training_and_not_by_the_export_after_it(
    case: Case, refused: Callable[..., str]
) -> None:
    path = case.folder / "trio" / "math" / "generation_config.json"
    path.write_text('{"eos_token_id": ["</s>"]}')
    assert refused("plan") == f"{path}: eos_token_id = ['</s>']; expected a token or a list of tokens"


def test_missing_data_file(case: Case, refused: Callable[..., str]) -> None:
    message = refused("plan", "--ranks", "1", "data.classes.math.heldout.0=gone.jsonl")
    assert message == f"data.classes.math.heldout: {case.folder / 'trio' / 'data' / 'gone.jsonl'}: no such file"


def test_data_file_in_another_format(case: Case, refused: Callable[..., str]) -> None:
    file = case.folder / "trio" / "data" / "math.train.jsonl"
    file.write_text("instruction,output\nadd,3\n")
    message = refused("plan", "--ranks", "1", "data.on_malformed=skip")
    assert message.startswith(f"data.classes.math.train: {file}: its lines are no JSON objects (the first: 'instr")


def test_columns_of_no_entry_and_of_no_field(refused: Callable[..., str]) -> None:
    message = refused("plan", "--ranks", "1", "data.classes.math.columns={other.jsonl: {prompt: a, completion: b}}")
    assert message.startswith("data.classes.math.columns: other.jsonl is not one of its entries, math.train.jsonl, ")
    message = refused("plan", "--ranks", "1", "data.classes.math.columns={math.train.jsonl: {instructions: a}}")
    assert message.startswith("data.classes.math.columns.math.train.jsonl: instructions is no field that is read")


@pytest.mark.parametrize("command", ["prepare", "train"])
def test_class_without_a_usable_row(case: Case, refused: Callable[..., str], command: str) -> None:
    (case.folder / "trio" / "data" / "code.train.jsonl").write_text('{"instruction": "Say nothing.", "output": ""}\n')
    message = refused(command, *(["--ranks", "1"] if command == "train" else []), "data.on_malformed=skip")
    assert message.startswith('class "code" is left without train rows: 1 read, dropped: 1 ')


def spoil_second_row(case: Case) -> Path:
    file = case.folder / "trio" / "data" / "code.train.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], '{"title": "no instruction"}', *lines[1:]]))
    return file


@pytest.mark.parametrize("command", ["prepare", "train"])
def test_malformed_row(case: Case, refused: Callable[..., str], command: str) -> None:
    file = spoil_second_row(case)
    message = refused(command, *(["--ranks", "1"] if command == "train" else []))
    assert message.startswith(f"{file}:2 (row 2): ")
    assert "title" in message


@pytest.mark.parametrize(
    ("place", "reason"), [("file/store", "File exists"), ("n" * 300, "File name too long"), ("gone", "Not a directory")]
)
@pytest.mark.parametrize("command", ["prepare", "train"])
def test_store_in_an_impossible_place(
    case: Case, refused: Callable[..., str], command: str, place: str, reason: str
) -> None:
    (case.folder / "file").write_text("")
    (case.folder / "gone").symlink_to(case.folder / "nowhere")
    message = refused(command, f"data.store={case.folder / place}")
    assert message.startswith(f"data.store: {case.folder / place}: cannot be written (") and reason in message


@pytest.mark.parametrize("command", ["plan --config NAME", "verify NAME", "export NAME out", "generate NAME hello"])
def test_a_name_that_no_file_can_have_is_one_line(
    command: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt in the place of a folder, say."""
    name = "x" * 300
    monkeypatch.setattr(sys, "argv", ["ultrafuser", *command.replace("NAME", name).split()])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    message = only_error(capfd.readouterr().err)
    assert message.startswith(name) and message.endswith(": cannot be read or written (File name too long)")


def test_checkpoint_of_another_model(case: Case, refused: Callable[..., str]) -> None:
    case.tree["stage1"] |= {"steps": 1}
    case.tree["stage2"] |= {"steps": 0}
    train(case.tree, 1)
    math = case.folder / "trio" / "math"
    shutil.rmtree(math)
    tiny_llama(
        math,
        vocab_rows=PIECES + 1,
        hidden_size=32,
        layers=2,
        heads=4,
        kv_heads=4,
        rope_theta=1e4,
        seed=9,
        dtype=torch.float32,
    )
    tiny_tokenizer(math, pieces=PIECES)
    message = refused("train", "--ranks", "1", "--resume")
    assert "checkpoint of another model: specialists.math." in message
    assert str(case.runs / "run" / "checkpoints") in message


def test_resuming_a_run_that_has_no_checkpoint(case: Case, refused: Callable[..., str]) -> None:
    assert "holds no complete checkpoint; start without --resume" in refused("train", "--ranks", "1", "--resume")


def run_process(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def test_process_says_nothing_else(case: Case) -> None:
    """What the tests above call in this process, once for real: no warning of an import, the exit code itself."""
    program = "from ultrafuser_mega.cli import main; main()"
    result = run_process("-c", program, "plan", "--config", str(case.config), "--ranks", "2")
    assert result.returncode == 2
    assert result.stderr == (
        "error: layouts: none of the configured layouts uses 2 rank(s); launch with 1, or add a layout for 2\n"
    )


@pytest.mark.slow
def test_job_under_torchrun_ends_with_the_same_line(case: Case) -> None:
    """Rank 0 meets the malformed row while it tokenises; the other waits for it.

    tests/distributed/test_failure.py has both parts in quick tests: a rank with bad input, and a job under torchrun.
    """
    file = spoil_second_row(case)
    case.tree["layouts"] = [COLOCATED_TP2]
    result = run_process(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("examples/pretrain_fuser.py", "--config", str(case.config)),
    )
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {file}:2 (row 2): ")
    assert "ultrafuser_mega/" not in result.stderr  # torchrun adds a traceback, of its own code
    assert f"traceback : {errors[0]}" in result.stderr.partition("Root Cause")[2]  # and its report names the cause
    assert files_under(case.runs) == []
