"""The model card says what the run and the specialists' folders say, and nothing else."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.release_folder import PIECES

from ultrafuser_mega.config import dump_config, load_config
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.release import CardFacts, assemble_release
from ultrafuser_mega.reporting.records import EvalRecord, build_summary, write_summary


def evaluation(stage: int, step: int, fused: float) -> EvalRecord:
    loss = {
        "prose": {"fused": fused, "text": 2.0, "code": 3.0, "math": 4.0},
        "programs": {"fused": fused / 2, "text": 5.0, "code": math.nan, "math": 6.0},
    }
    gate = {"prose": {"text": 0.7, "code": 0.2, "math": 0.1}, "programs": {"text": 0.1, "code": 0.8, "math": 0.1}}
    return EvalRecord(stage=stage, step=step, loss=loss, gate=gate)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    config = load_config(None, ["stage1.steps=40", "stage2.lr=2e-5", "stage2.gate_lr=1e-3", "data.max_length=2048"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
    facts: dict[str, Any] = {"tokens_per_s": 1.0, "steps": 190, "layout": "colocated", "device": "cpu", "wall_s": 1.0}
    write_summary(
        tmp_path / "run", build_summary(evaluation(2, 190, 1.0), **facts, after_stage1=evaluation(1, 40, 1.5))
    )
    return tmp_path / "run"


def card_of(facts: CardFacts, specialists: Any, out: Path) -> str:
    assemble_release(out, specialists, PIECES, 8, False, torch.float32, facts)
    return (out / "README.md").read_text()


def cells(card: str, row: str) -> list[str]:
    """The cells of the one table row that is called ``row``."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line.startswith("|")]
    (found,) = [cells for name, *cells in rows if name == row]
    return found


def test_the_tables_are_those_of_the_finished_run(run_dir: Any, specialists: Any, tmp_path: Path) -> None:
    card = card_of(CardFacts.from_run(run_dir, "my-fused"), specialists["llamas"], tmp_path / "out")
    assert "\n# my-fused\n" in card
    assert cells(card, "fused") == ["**1.000**", "**0.500**", "**0.750**"]
    assert cells(card, "fused after stage 1") == ["1.500", "0.750", "1.125"]
    losses = card[card.index("Held-out loss") :]
    assert cells(losses[: losses.index("Average gate")], "code") == ["3.000", "-", "-"]
    assert cells(card, "w_code") == ["0.20", "**0.80**"]


def test_a_summary_of_the_first_version_is_read_as_well(run_dir: Path, specialists: Any, tmp_path: Path) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    for part in (summary, summary["after_stage1"]):
        part["gate"] = part.pop("gate_per_token")
    write_summary(run_dir, summary)
    card = card_of(CardFacts.from_run(run_dir, "my-fused"), specialists["llamas"], tmp_path / "out")
    assert cells(card, "w_code") == ["0.20", "**0.80**"]


def test_the_recipe_and_the_data_are_those_of_the_configuration(run_dir: Any, specialists: Any, tmp_path: Path) -> None:
    card = card_of(CardFacts.from_run(run_dir, "x"), specialists["llamas"], tmp_path / "out")
    assert cells(card, "1: gate only") == ["40", "8 x 3", "0.03", "cosine", "5", "0"]
    assert cells(card, "2: everything") == ["150", "8 x 3", "2e-05, gate 0.001", "cosine", "5", "0"]
    assert "sequences of at most 2048 tokens, loss per token" in card
    data = card[card.index("Data, one class") : card.index("Two stages")]
    assert cells(data, "text") == ["text.train.jsonl", "text.heldout.jsonl"]


def test_the_card_names_rates_of_parts_and_weights_of_files(specialists: Any, tmp_path: Path) -> None:
    overrides = [
        "stage2.train={text: lora, math: frozen}",
        "stage2.train.code={lr: 1.0e-4, schedule: constant, warmup_steps: 0, weight_decay: 0.5}",
        "data.classes.text.train=[rare.jsonl, often.jsonl]",
        "data.classes.text.weights={rare.jsonl: 1, often.jsonl: 4}",
        "data.classes.text.heldout=[held.jsonl]",
    ]
    card = card_of(CardFacts("x", load_config(None, overrides), None), specialists["llamas"], tmp_path / "out")
    row = cells(card, "2: gate, heads, code, adapters of text")
    assert [row[2].split(", ")[1:], row[3], row[4], row[5]] == [
        ["code 0.0001"],
        "cosine, code constant",
        "5, code 0",
        "0, code 0.5",
    ]
    data = card[card.index("Data, one class") : card.index("Two stages")]
    assert cells(data, "text") == ["rare.jsonl (weight 1), often.jsonl (weight 4)", "held.jsonl"]


@pytest.mark.parametrize(("left_out", "kept"), [("stage1", "2: everything"), ("stage2", "1: gate only")])
def test_a_stage_without_steps_is_not_on_the_card(specialists: Any, tmp_path: Path, left_out: str, kept: str) -> None:
    config = load_config(None, [f"{left_out}.steps=0"])
    card = card_of(CardFacts("x", config, None), specialists["llamas"], tmp_path / "out")
    training = card[card.index("One stage, every global batch") : card.index("AdamW")]
    assert [line.split(" | ")[0] for line in training.splitlines() if "|" in line][2:] == [f"| {kept}"]


@pytest.mark.parametrize(
    ("sampling", "words"),
    [("iid", "drawn from all rows alike."), ("{text: 10, code: 1, math: 1}", "by weights: text 10, code 1, math 1.")],
)
def test_the_card_says_how_samples_were_drawn(specialists: Any, tmp_path: Path, sampling: str, words: str) -> None:
    config = load_config(None, [f"data.sampling={sampling}"])
    card = card_of(CardFacts("x", config, None), specialists["llamas"], tmp_path / "out")
    assert f"Two stages, every global batch {words}" in card


def test_no_path_of_the_machine_it_was_made_on_reaches_the_card(run_dir: Any, specialists: Any, tmp_path: Path) -> None:
    card = card_of(CardFacts.from_run(run_dir, "x"), specialists["llamas"], tmp_path / "out")
    assert str(tmp_path) not in card and "/tmp" not in card


def test_licences_are_what_the_folders_state(run_dir: Any, specialists: Any, tmp_path: Path) -> None:
    members = {}
    for name, (folder, template) in specialists["llamas"].items():
        shutil.copytree(folder, tmp_path / name)
        members[name] = (tmp_path / name, template)
    (tmp_path / "code" / "README.md").write_text("---\nlicense: llama2\ntags: [code]\n---\n# Code\n")
    (tmp_path / "code" / "LICENSE").write_text("\n  LLAMA 2 COMMUNITY LICENSE AGREEMENT\nmore\n")
    (tmp_path / "math" / "README.md").write_text("---\nlicense: [broken\n---\n")
    card = card_of(CardFacts.from_run(run_dir, "x"), members, tmp_path / "out")
    licences = card[card.index("## Licences") : card.index("## Training")]
    assert cells(licences, "text") == cells(licences, "math") == ["not stated"]
    assert cells(licences, "code") == ["llama2 (README.md); LLAMA 2 COMMUNITY LICENSE AGREEMENT (LICENSE)"]
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "other"

    for name in members:
        (tmp_path / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    agreed = card_of(CardFacts.from_run(run_dir, "x"), members, tmp_path / "out")
    assert yaml.safe_load(agreed.split("---\n")[1]) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ultrafuser", "custom_code"],
        "license": "apache-2.0",
    }


def test_a_run_without_a_summary_makes_a_card_without_results(run_dir: Any, specialists: Any, tmp_path: Path) -> None:
    (run_dir / "summary.json").unlink()
    facts = CardFacts.from_run(run_dir, "x")
    assert facts.summary is None
    assert "were not evaluated by the run" in card_of(facts, specialists["llamas"], tmp_path / "out")


def test_a_damaged_summary_is_refused_by_name(run_dir: Any) -> None:
    (run_dir / "summary.json").write_text(json.dumps({})[:1])
    with pytest.raises(InputError, match=r"summary\.json: not valid JSON"):
        CardFacts.from_run(run_dir, "x")


def test_licences_under_other_names_are_named_and_travel(run_dir: Any, specialists: Any, tmp_path: Path) -> None:
    members = {}
    for name, (folder, template) in specialists["llamas"].items():
        shutil.copytree(folder, tmp_path / name)
        members[name] = (tmp_path / name, template)
    stated = {
        "text": "---\nlicense: [mit, apache-2.0]\n---\n",
        "code": "\ufeff---\nlicense: other\nlicense_name: tongyi\n---\n",
    }
    for name, text in stated.items():
        (tmp_path / name / "README.md").write_text(text, encoding="utf-8")
    (tmp_path / "math" / "MODEL_LICENSE").write_text("The Model Licence\n")
    (tmp_path / "math" / "LICENSE.pdf").write_bytes(b"%PDF\x00")
    card = card_of(CardFacts.from_run(run_dir, "x"), members, tmp_path / "out")
    licences = card[card.index("## Licences") : card.index("## Training")]
    assert cells(licences, "text") == ["mit, apache-2.0 (README.md)"]
    assert cells(licences, "code") == ["tongyi (README.md)"]
    assert cells(licences, "math") == ["see the file (LICENSE.pdf); The Model Licence (MODEL_LICENSE)"]
    kept = {str(path.relative_to(tmp_path / "out" / "licenses")) for path in (tmp_path / "out").rglob("licenses/*/*")}
    assert kept == {"text/README.md", "code/README.md", "math/LICENSE.pdf", "math/MODEL_LICENSE"}


def test_what_was_rounded_and_where_training_began_is_on_the_card(specialists: Any, tmp_path: Path) -> None:
    config = load_config(None, [f"checkpoint.start={tmp_path}/older/my_release"])
    facts = CardFacts("x", config, None, rounded={"code": "3 float32 tensors rounded to bfloat16"})
    card = card_of(facts, specialists["llamas"], tmp_path / "out")
    assert cells(card[card.index("## Rounding") :], "code") == ["3 float32 tensors rounded to bfloat16"]
    assert "began with the weights of `my_release`" in card and str(tmp_path) not in card


def test_an_imported_release_keeps_its_card(specialists: Any, tmp_path: Path) -> None:
    facts = CardFacts("x", None, None, earlier="# Mine\n\nedited by hand\n")
    assert card_of(facts, specialists["llamas"], tmp_path / "out") == "# Mine\n\nedited by hand\n"
