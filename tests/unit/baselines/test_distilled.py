"""``ultrafuser distil`` from a checkpoint to a folder of one model."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import yaml
from support.branched import branched_tree, write_branched
from support.command import ultrafuser
from support.trio import DISJOINT_8, config_tree, train

from ultrafuser_mega.baselines.distilled import STUDENT, distilled
from ultrafuser_mega.baselines.heldout import heldout_losses, load_model
from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints
from ultrafuser_mega.config import DisjointLayout, FuserConfig, load_config
from ultrafuser_mega.convert.export import export
from ultrafuser_mega.convert.importer import import_specialists, plan_config
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.address import Address
from ultrafuser_mega.planning.preflight import first_layouts_ranks, preflight
from ultrafuser_mega.planning.trained import part_shares

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def branched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_branched(tmp_path_factory.mktemp("branched"))


def test_the_run_takes_as_many_samples_as_the_fused_one_and_places_the_student(branched: Path, tmp_path: Path) -> None:
    tree = config_tree(branched, tmp_path / "runs", DISJOINT_8)
    tree["stage1"] |= {"steps": 10, "samples_per_class": 4}
    tree["stage2"] |= {"steps": 7, "samples_per_class": 6, "gate_lr": 1e-2}
    import_specialists(plan_config(FuserConfig.model_validate(tree), None), tmp_path / "teacher")
    made = distilled(tmp_path / "teacher", "math", overrides=["distil.temperature=2"])
    run = made.config
    assert run.name == "run-distilled-math" and list(run.stages) == [2] and run.stage2.steps == 14
    assert run.fused == ["text", "code", "math"] and run.folders[STUDENT] == branched / "math"
    assert run.specialists[STUDENT].template == "wizardmath" and run.vocab_size == 400
    layout = run.layouts[0]
    assert isinstance(layout, DisjointLayout) and (layout.specialists[STUDENT].tp, layout.specialists[STUDENT].pp) == (
        2,
        2,
    )
    modes = {name: part.mode for name, part in run.parts(2).items()}
    frozen = ["gate", "text", "code", "math"]
    assert [modes[name] for name in frozen] == ["frozen"] * 4 and modes[STUDENT] == "full"
    assert made.what == f"specialist:{STUDENT}" and made.account.settings["temperature"] == 2.0
    shares = {share.name: share for share in part_shares(preflight(run, first_layouts_ranks(run), False), 2)}
    assert shares["heads"].parameters == 4 * shares["heads"].trained > 0 == shares["gate"].trained  # the student's
    other = distilled(tmp_path / "teacher", str(branched / "base"), "ultralm").config
    assert other.name == "run-distilled-base" and other.specialists[STUDENT].template == "ultralm"


def test_overrides_that_say_where_the_fused_models_folders_are_hold_for_the_students(
    branched: Path, tmp_path: Path
) -> None:
    tree = config_tree(branched, tmp_path / "runs", DISJOINT_8)
    import_specialists(plan_config(FuserConfig.model_validate(tree), None), tmp_path / "teacher")
    for specialist in tree["specialists"].values():
        specialist["path"] = Path(specialist["path"]).name
    config = tmp_path / "moved.yaml"
    config.write_text(yaml.safe_dump(tree))
    moved = distilled(tmp_path / "teacher", "math", None, config, [f"models={branched}"]).config
    assert moved.folders[STUDENT] == moved.folders["math"] == branched / "math"
    overrides = [f"models={branched}", "specialists.math.path=base", "specialists.student.template=ultralm"]
    other = distilled(tmp_path / "teacher", "math", None, config, overrides).config
    assert other.folders[STUDENT] == branched / "base" and other.specialists[STUDENT].template == "ultralm"


def test_a_student_is_trained_and_exported_as_one_model_with_its_own_template(
    branched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = FuserConfig.model_validate(branched_tree(branched, tmp_path / "runs"))
    import_specialists(plan_config(config, None), tmp_path / "teacher")
    out = tmp_path / "out"
    arguments = ["distil", tmp_path / "teacher", "--into", "math", "--out", out, "stage2.steps=2"]
    arguments += ["distil.data={own: 1, on_policy: 1}", "distil.max_new_tokens=3", "distil.labels=0.1"]
    assert ultrafuser(monkeypatch, *arguments) == 0, capsys.readouterr()
    run = load_config(out / "config.yaml")
    assert run == load_config(tmp_path / "runs" / "run-distilled-math.yaml")
    store, model = TokenStore.open(run.store_dir), load_model(out, CPU)
    summary = json.loads((out / "summary.json").read_text())
    for name, loss in heldout_losses(model, store, run, STUDENT).items():
        assert summary["eval"][name]["fused"] == pytest.approx(loss, rel=1e-5)
        assert summary["eval"][name][STUDENT] != pytest.approx(loss, rel=1e-5)  # as it came
    assert "### Instruction" in (out / "chat_template.jinja").read_text()
    assert "learned from the fused model of run (text, code, math): 2 steps" in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert json.loads((out / "baseline.json").read_text())["baseline"] == "distil"
    address = Address.parse(str(run.run_dir))  # of the run itself the student is meant, too
    assert address.part == STUDENT
    assert ultrafuser(monkeypatch, "export", run.run_dir, tmp_path / "fused", "--what", "fused") == 2
    assert "is a distillation; export its teacher's run, or specialist:student" in capsys.readouterr().err


def test_a_student_trains_by_adapters_of_a_teacher_that_leaves_weights_out_but_not_of_one_with_adapters(
    branched: Path, tmp_path: Path
) -> None:
    tree = branched_tree(branched, tmp_path / "runs") | {"checkpoint": {"weights": "trained"}}
    tree["stage1"]["steps"] = 0
    tree["stage2"] |= {"steps": 1, "train": {"specialists": "frozen", "heads": "frozen"}}
    run = train(tree, 1)
    made = distilled(run, "math", overrides=["stage2.steps=1", "stage2.train.student=lora"]).config
    assert made.distil is not None and made.distil.teacher == list_checkpoints(run / "checkpoints")[-1][1].resolve()
    train(made.model_dump(mode="json"), 1)
    summary = json.loads((made.run_dir / "summary.json").read_text())
    fused = json.loads((run / "summary.json").read_text())
    for name, losses in fused["eval"].items():
        assert summary["eval"][name]["teacher"] == pytest.approx(losses["fused"], rel=1e-5)
    export(made.run_dir, tmp_path / "adapter", f"adapter:{STUDENT}")
    files = (tmp_path / "adapter").iterdir()
    assert len({path.stat().st_mode for path in files}) == 1  # whoever reads one of them reads all
    said = export(made.run_dir, tmp_path / "student")
    assert any(line.startswith("verified") for line in said)
    with pytest.raises(InputError, match=rf"of a distillation student alone is meant; text is its teacher's, {run}"):
        export(made.run_dir, tmp_path / "text", "specialist:text")
    with ExitStack() as stack, pytest.raises(InputError, match="text is its teacher's"):
        Address.parse(f"{made.run_dir}@text").stored(stack)
    with pytest.raises(InputError, match="distilled-math: is a distillation itself; give the run that it learned from"):
        distilled(made.run_dir, "math")
    adapted = train(tree | {"name": "adapted", "stage2": tree["stage2"] | {"train": {"specialists": "lora"}}}, 1)
    with pytest.raises(
        InputError, match=r"adapted: text, code, math have adapters, and a teacher has none; merge them:"
    ):
        distilled(adapted, "math")
    (tmp_path / "small").mkdir()
    fields = json.loads((branched / "math" / "config.json").read_text()) | {"vocab_size": 399}
    (tmp_path / "small" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=r"^--into .*small: its head has 399 rows, fewer than the 400 that are fused$"):
        distilled(run, str(tmp_path / "small"))
    with pytest.raises(InputError, match=r"nowhere: no such folder$"):
        distilled(tmp_path / "nowhere", "math")


def test_a_student_of_another_tokenizer_is_refused_in_one_line(
    branched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = FuserConfig.model_validate(branched_tree(branched, tmp_path / "runs"))
    import_specialists(plan_config(config, None), tmp_path / "teacher")
    other = Path(shutil.copytree(branched / "math", tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    one, two = sorted(vocab, key=vocab.__getitem__)[300:302]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    out = tmp_path / "out"
    assert ultrafuser(monkeypatch, "distil", tmp_path / "teacher", "--into", other, "--out", out) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: --into {other}: tokenizers of text (") and f"and student ({other}, " in line
    assert "disagree: the piece of id 300 is" in line
    assert not out.exists() and not (tmp_path / "runs").exists()
