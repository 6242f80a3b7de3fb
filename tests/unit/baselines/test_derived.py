"""Runs that stand beside the fused one: what their configurations take over, and the folders that come of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from support.branched import branched_tree, write_branched
from support.command import ultrafuser
from support.trio import DISJOINT_8, config_tree, read_steps
from support.tuning import plain_loss
from typer import Exit

from ultrafuser_mega.baselines.derived import DerivedRun, further_tuned, llamafuser
from ultrafuser_mega.baselines.heldout import heldout_losses, load_model
from ultrafuser_mega.baselines.tuning import Tuning, tune
from ultrafuser_mega.cli.baseline import train_and_export
from ultrafuser_mega.config import FuserConfig, load_config
from ultrafuser_mega.convert.compare import DifferentModel
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.launch import job
from ultrafuser_mega.reporting.records import MetricsWriter, StepRecord, write_summary


@pytest.fixture(scope="module")
def branched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_branched(tmp_path_factory.mktemp("branched"))


def test_further_tuned_takes_as_many_samples_as_the_fused_run(branched: Path, tmp_path: Path) -> None:
    tree = config_tree(branched, tmp_path / "runs", DISJOINT_8)
    tree["stage1"] |= {"steps": 10, "samples_per_class": 4}
    tree["stage2"] |= {"steps": 7, "samples_per_class": 6}
    config = FuserConfig.model_validate(tree)
    run = further_tuned(config, "math").config
    assert list(run.specialists) == ["math"] and list(run.stages) == [2]
    assert run.stage2.steps == 14  # 10 x 4 + 7 x 6 = 82 samples of each class, in batches of 6
    assert (run.layouts[0].tp, run.layouts[0].pp) == (2, 2)  # type: ignore[union-attr]
    assert run.vocab_size == 400  # the trio's, although math has a row more
    assert run.stage2.lr == config.stage2.lr and run.seed == config.seed
    on_one = further_tuned(config, "text", ["math"]).config
    assert list(on_one.data.classes) == ["math"]
    assert on_one.stage2.samples_per_class == 18 and on_one.stage2.steps == 14  # as many samples in a batch
    assert on_one.name == "run-further-tuned-text-on-math"


def test_further_tuned_trains_adapters_at_their_rates_where_the_fused_run_does(branched: Path, tmp_path: Path) -> None:
    tree = branched_tree(branched, tmp_path / "runs")
    part = {"mode": "lora", "lr": 2e-3}
    tree["stage2"]["train"] = {"gate": {"lr": 1e-3}, "heads": "frozen", "specialists": "lora", "math": part}
    config = FuserConfig.model_validate(tree)
    of = {name: further_tuned(config, name).config for name in ("text", "math")}
    for name, run in of.items():
        assert {part: one.mode for part, one in run.parts(2).items()} == {
            "gate": "frozen",
            "heads": "frozen",
            name: "lora",
        }
    assert of["text"].parts(2)["text"].rates.lr == config.stage2.lr
    assert of["math"].parts(2)["math"].rates.lr == 2e-3
    tree["stage2"]["train"] = {"specialists": "frozen"}
    whole = further_tuned(FuserConfig.model_validate(tree), "text").config
    assert {one.mode for one in whole.parts(2).values()} == {"full"}


def test_llamafuser_is_the_same_run_over_one_folder(branched: Path, tmp_path: Path) -> None:
    config = FuserConfig.model_validate(branched_tree(branched, tmp_path / "runs"))
    run = llamafuser(config, branched / "base").config
    assert set(run.folders.values()) == {branched / "base"}
    assert {name: part.template for name, part in run.specialists.items()} == {
        name: part.template for name, part in config.specialists.items()
    }
    assert (run.stage1, run.stage2, run.gate, run.layouts) == (
        config.stage1,
        config.stage2,
        config.gate,
        config.layouts,
    )


def test_what_cannot_be_derived_is_refused(branched: Path, tmp_path: Path) -> None:
    config = FuserConfig.model_validate(branched_tree(branched, tmp_path / "runs"))
    with pytest.raises(InputError, match="--specialist law: the configuration has text, code, math"):
        further_tuned(config, "law")
    with pytest.raises(InputError, match="--classes law: the configuration has text, code, math"):
        further_tuned(config, "text", ["law"])
    weighed = branched_tree(branched, tmp_path / "runs")
    weighed["data"] = weighed["data"] | {"sampling": {"text": 1, "code": 0, "math": 0}}
    with pytest.raises(InputError, match=r"the baseline's configuration: .*no class has a weight"):
        further_tuned(FuserConfig.model_validate(weighed), "code", ["code"])
    begun = branched_tree(branched, tmp_path / "runs", checkpoint={"start": "somewhere"})
    with pytest.raises(InputError, match=r"checkpoint\.start=null"):
        llamafuser(FuserConfig.model_validate(begun), branched / "base")


def test_a_further_tuned_specialist_is_trained_and_exported(
    branched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "config.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(branched_tree(branched, tmp_path / "runs"), sort_keys=False))
    arguments = ["--config", path, "--specialist", "math", "--out", out, "stage2.steps=1", "optimizer.weight_decay=0.1"]
    assert ultrafuser(monkeypatch, "baseline", "further-tuned", *arguments) == 0, capsys.readouterr()
    run = load_config(out / "config.yaml")
    assert run == load_config(tmp_path / "runs" / "run-further-tuned-math.yaml")
    store, model = TokenStore.open(run.store_dir), load_model(out, torch.device("cpu"))
    summary = json.loads((out / "summary.json").read_text())
    # The row that math has beyond the shared vocabulary is left out by both; fp32 logits of order 1.
    for name, loss in heldout_losses(model, store, run, "math").items():
        assert summary["eval"][name]["fused"] == pytest.approx(loss, rel=1e-5)
        assert summary["eval"][name]["math"] != pytest.approx(loss, rel=1e-5)  # before
    assert summary["steps"] == 3
    # The loop that trains what is no specialist takes the same steps with a dense model.
    tree = run.model_dump(mode="json") | {"name": "again"}
    tree["data"]["store"] = str(run.store_dir)
    again = Tuning(FuserConfig.model_validate(tree), store, ("math",), {}, "again")
    other = load_model(branched / "math", torch.device("cpu"))
    assert tune(other, again, plain_loss(again)) is None
    losses = [[r["loss"] for r in read_steps(of.run_dir)] for of in (run, again.config)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    before = load_model(branched / "math", torch.device("cpu")).state_dict()
    trainers, loops = (
        torch.cat([(new - before[name]).flatten() for name, new in of.state_dict().items()]) for of in (model, other)
    )
    # AdamW's first steps are signs, which differ where a gradient is near rounding; such weights are few.
    assert torch.cosine_similarity(trainers, loops, dim=0) > 0.999
    assert "### Instruction" in (out / "chat_template.jinja").read_text()
    assert "trained further on text, code, math data: 3 steps" in (out / "README.md").read_text()
    # Once more, without training: the name is taken.
    assert ultrafuser(monkeypatch, "baseline", "further-tuned", *arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_only_what_was_trained_to_its_end_is_exported(
    branched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An hour's end is no failure of the run: its code is 0."""
    run = further_tuned(FuserConfig.model_validate(branched_tree(branched, tmp_path / "runs")), "text")
    run.config.run_dir.mkdir(parents=True)
    monkeypatch.setattr(job, "train_here", lambda *of, **options: 0)

    def differs(self: DerivedRun, out: Path) -> list[str]:
        raise DifferentModel(f"{out}: computes something else")

    monkeypatch.setattr(DerivedRun, "export", differs)

    def code() -> int:
        with pytest.raises(Exit) as end:
            train_and_export(run, tmp_path / "out", None, False, False, 0)
        return end.value.exit_code

    assert code() == 0  # its first part
    write_summary(run.config.run_dir, {"steps": 1})
    step = StepRecord(
        stage=2,
        step=1,
        loss=1.0,
        class_loss={},
        lr=1.0,
        grad_norm=1.0,
        tokens=1,
        tokens_per_s=1.0,
        gate={},
        seconds=1.0,
    )
    with MetricsWriter(run.config.run_dir, resume_step=None) as metrics:
        metrics.write_step(step)
        metrics.write_step(replace(step, step=2))
    assert code() == 0  # over once, then given another step
    assert capsys.readouterr().err == ""
    write_summary(run.config.run_dir, {"steps": 2})
    assert code() == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/out: computes something else\n"
    nothing = run.config.model_copy(update={"stage2": run.config.stage2.model_copy(update={"steps": 0})})
    with pytest.raises(InputError, match=r"^stage2\.steps: 0 trains nothing"):
        train_and_export(replace(run, config=nothing), tmp_path / "out", None, False, False, 0)


@pytest.mark.slow
def test_llamafuser_becomes_a_release(
    branched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "config.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(branched_tree(branched, tmp_path / "runs"), sort_keys=False))
    arguments = ["--config", path, "--base", branched / "base", "--out", out]
    assert ultrafuser(monkeypatch, "baseline", "llamafuser", *arguments) == 0, capsys.readouterr()
    assert json.loads((out / "config.json").read_text())["model_type"] == "ultrafuser"
    assert "3 copies of base, which was not specialised" in (out / "README.md").read_text()
    assert json.loads((out / "baseline.json").read_text())["settings"]["copies"] == 3
    assert ultrafuser(monkeypatch, "generate", out, "Hello", "--max-new-tokens", 2) == 0
