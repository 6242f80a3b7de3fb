"""Building the trio: one small real build, and the orchestration around it with training replaced."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.toy import ToyRecipe, build, make_toy, tiny_llama, worker
from ultrafuser_mega.toy.corpus import BASE, CLASSES, read_jsonl
from ultrafuser_mega.toy.jobs import Job, run_jobs

SMALL = ToyRecipe(hidden_size=32, layers=2, pieces=512, train_rows=60, heldout_rows=10, steps=3, batch_size=4)
FINAL_NAMES = {*CLASSES, "data", "recipe.json"}
BRANCHED = replace(SMALL, branched=True, branch_steps=2)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_toy(tmp_path_factory.mktemp("toy"), seed=1, progress=False, recipe=SMALL)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace the training processes by random weights; returns the list of what would have been trained."""
    started: list[str] = []

    def fake(jobs: Any, console: Any) -> Any:
        started.append("all" if len(jobs) > 1 else jobs[0].name)
        for job in jobs:
            own = {key: job.shape[key] for key in ("vocab_rows", "kv_heads", "rope_theta")}
            tiny_llama(job.folder, hidden_size=32, layers=2, heads=4, seed=job.seed, dtype=torch.float32, **own)
        return {job.name: dict.fromkeys(CLASSES, 1.0) for job in jobs}

    monkeypatch.setattr(build, "run_jobs", fake)
    return started


def names_in(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()} & FINAL_NAMES


def test_the_three_differ_as_the_papers_trio_does(toy: Any) -> None:
    configs = {name: AutoModelForCausalLM.from_pretrained(path).config for name, path in toy.specialists.items()}
    assert {name: config.vocab_size for name, config in configs.items()} == {"text": 512, "code": 528, "math": 513}
    thetas = {name: config.rope_parameters["rope_theta"] for name, config in configs.items()}
    assert thetas == {"text": 1e4, "code": 1e6, "math": 1e4}
    assert {name: config.num_key_value_heads for name, config in configs.items()} == {"text": 4, "code": 2, "math": 4}


def test_the_folders_are_complete_and_share_one_tokenizer(toy: Any) -> None:
    for name, folder in toy.specialists.items():
        files = {path.name for path in folder.iterdir()}
        assert files == {"config.json", "model.safetensors", "generation_config.json", "tokenizer.model",
                         "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}  # fmt: skip
        assert len(AutoTokenizer.from_pretrained(folder, local_files_only=True)) == 512
        assert (folder / "tokenizer.json").read_bytes() == (toy.specialists["text"] / "tokenizer.json").read_bytes()
        assert len(read_jsonl(toy.train[name])) == 60
        assert len(read_jsonl(toy.heldout[name])) == 10
        assert len(toy.tasks[name].read_text().splitlines()) == SMALL.task_rows
        assert all(0 < toy.heldout_loss[name][other] < 20 for other in CLASSES)


def test_a_branched_trio_is_of_one_shape_and_keeps_the_base_it_began_with(tmp_path: Path, trainings: Any) -> None:
    toy = make_toy(tmp_path, progress=False, recipe=BRANCHED)
    assert trainings == [BASE, "all"]
    assert toy.base == tmp_path / BASE and set(toy.heldout_loss) == {*CLASSES, BASE}
    for folder in toy.specialists.values():
        assert (folder / "config.json").read_bytes() == (toy.base / "config.json").read_bytes()
    assert make_toy(tmp_path, progress=False, recipe=BRANCHED) == toy
    usual = make_toy(tmp_path, progress=False, recipe=SMALL)
    assert usual.base is None and not (tmp_path / BASE).exists()


def test_a_specialist_of_a_branched_trio_is_trained_on_from_the_base(
    tmp_path: Path, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {name: tmp_path / name for name in (BASE, "text")}
    for folder in folders.values():
        shutil.copytree(toy.specialists["text"], folder)
    start = str(folders[BASE])
    for name, steps, lr, begin in ((BASE, 2, 1e-3, None), ("text", 1, 0.0, start)):
        job = Job(name, str(folders[name]), str(toy.root / "data"), BRANCHED.shape(name), steps, 4, lr, 7, "cpu", begin)
        monkeypatch.setattr(sys, "argv", ["worker", json.dumps(asdict(job))])
        worker.main()
    base, text, other = (
        load_file(folder / "model.safetensors") for folder in (*folders.values(), toy.specialists["text"])
    )
    assert all(torch.equal(base[name], text[name]) for name in base)  # at a rate of zero
    assert not all(torch.equal(base[name], other[name]) for name in base)


def test_a_finished_trio_is_reused_without_touching_it(toy: Any, trainings: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in toy.root.rglob("*")}
    assert make_toy(toy.root, seed=1, progress=False, recipe=SMALL) == toy
    assert {path: path.stat().st_mtime_ns for path in toy.root.rglob("*")} == before
    assert trainings == []


def test_another_seed_or_a_damaged_file_means_a_new_build(tmp_path: Path, trainings: Any) -> None:
    first = make_toy(tmp_path, seed=1, progress=False, recipe=SMALL)
    rows = read_jsonl(first.train["text"])
    make_toy(tmp_path, seed=2, progress=False, recipe=SMALL)
    assert read_jsonl(first.train["text"]) != rows
    (tmp_path / "math" / "model.safetensors").write_bytes(b"cut short")
    make_toy(tmp_path, seed=2, progress=False, recipe=SMALL)
    assert trainings == ["all"] * 3
    AutoModelForCausalLM.from_pretrained(tmp_path / "math")


def test_an_interrupted_build_leaves_no_final_name_and_the_next_one_succeeds(
    tmp_path: Path, trainings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(jobs: Any, console: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build, "run_jobs", interrupted)
        make_toy(tmp_path, progress=False, recipe=SMALL)
    assert names_in(tmp_path) == set()
    make_toy(tmp_path, progress=False, recipe=SMALL)
    assert names_in(tmp_path) == FINAL_NAMES
    assert not (tmp_path / ".partial").exists()


def test_a_build_interrupted_while_publishing_is_finished_not_repeated(
    tmp_path: Path, trainings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def rename_until_code(self: Any, target: Any) -> Any:
        if Path(target) == tmp_path / "code":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", rename_until_code)
        make_toy(tmp_path, progress=False, recipe=SMALL)
    assert "recipe.json" not in names_in(tmp_path)
    make_toy(tmp_path, progress=False, recipe=SMALL)
    assert names_in(tmp_path) == FINAL_NAMES
    assert trainings == ["all"]


def test_two_callers_at_once_build_once(tmp_path: Path, trainings: Any) -> None:
    results: list[Any] = []
    callers = [
        threading.Thread(target=lambda: results.append(make_toy(tmp_path, progress=False, recipe=SMALL)))
        for _ in range(2)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results[0] == results[1]
    assert trainings == ["all"]


def test_a_folder_of_someone_elses_is_never_replaced(tmp_path: Path, trainings: Any) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match=r"holds 'data' but no recipe\.json"):
        make_toy(tmp_path, progress=False, recipe=SMALL)
    assert (tmp_path / "data" / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("device", "recipe", "message"),
    [
        ("abacus", SMALL, "^device = 'abacus': "),
        ("cpu", ToyRecipe(hidden_size=60), "^hidden_size = 60: "),
        ("cpu", ToyRecipe(steps=0), "^steps = 0: must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, device: str, recipe: Any, message: Any
) -> None:
    with pytest.raises(InputError, match=message):
        make_toy(tmp_path / "toy", device=device, progress=False, recipe=recipe)
    assert not (tmp_path / "toy").exists()


def test_a_failing_worker_is_named_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell in place of the Python that would first import all that training needs."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such file: math.train.jsonl >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    job = Job("math", str(tmp_path), str(tmp_path / "nothing"), SMALL.shape("math"), 1, 1, 1e-3, 0, "cpu")
    with pytest.raises(RuntimeError, match=r"(?s)toy specialist 'math' ended with code 1.*math\.train\.jsonl"):
        run_jobs([job], build.Console(quiet=True))
