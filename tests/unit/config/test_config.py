"""The configuration tree: defaults, overrides, and one line that names the key for everything that is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ultrafuser_mega.config import (
    FuserConfig,
    Optimizer,
    Toy,
    check_parts,
    default_config_text,
    dump_config,
    load_config,
)
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.planning.preflight import plan_layouts

EXAMPLES = sorted((Path(__file__).parents[3] / "examples" / "configs").glob("*.yaml"))


def refusal(*overrides: str) -> str:
    """What loading the embedded default with these overrides is refused with, without the file's name."""
    with pytest.raises(InputError) as caught:
        load_config(None, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix("the embedded default: ")


def test_embedded_default_is_the_eight_rank_toy_run() -> None:
    config = load_config(None)
    assert list(config.specialists) == ["text", "code", "math"]
    assert config.folders["math"] == Path("toy/math")
    assert config.run_dir == Path("runs/demo")
    assert config.store_dir == Path("runs/demo/store")
    assert [plan.world_size for plan in plan_layouts(config)] == [8, 6, 4, 3, 2, 1]


@pytest.mark.parametrize("path", [None, *EXAMPLES], ids=lambda path: path.name if path else "default.yaml")
def test_shipped_configuration_is_consistent(path: Path | None) -> None:
    """Everything that can be known without the models: layouts resolve, schedules can be followed, samples fit."""
    config = load_config(path)
    assert plan_layouts(config)
    for number, stage in config.stages.items():
        stage.check_schedule(f"stage{number}")
    assert config.microbatch_tokens >= config.data.max_length


def test_example_configurations_are_found() -> None:
    assert "nano_real.yaml" in [path.name for path in EXAMPLES]


def test_configuration_read_from_a_file(tmp_path: Path) -> None:
    tree = yaml.safe_load(default_config_text())
    tree["stage2"]["steps"] = 7
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    assert load_config(tmp_path / "mine.yaml").stage2.steps == 7


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("data.store=/tmp/store", "vocab_size=1000", "gate.hidden_size=32", "parallel.sequence_parallel=true"),
        ("data.classes.text.heldout_first={text.train.jsonl: 30}", "layouts.0.specialists.code.first_rank=2"),
    ],
)
def test_dumped_configuration_loads_back_to_itself(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    config = load_config(None, overrides)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


def value_at(config: FuserConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else value[int(part)] if part.isdigit() else getattr(value, part)
    return value


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("name=other", "other"),
        ("name='1.10'", "1.10"),
        ("stage1.steps=7", 7),
        ("stage1.lr=2e-3", 2e-3),  # a word to YAML 1.1, which wants 2.0e-3
        ("stage1.lr=1", 1.0),
        ("parallel.sequence_parallel=true", True),
        ("specialists.math.template=hf", "hf"),
        ("layouts.1.specialists.text.tp=4", 4),
        ("layouts.5.dp=2", 2),
        ("data.classes.code.train.0=mine.jsonl", Path("mine.jsonl")),
        ("data.classes.code.train=[a.json, b.json]", [Path("a.json"), Path("b.json")]),
        ("optimizer.weight_decay=0.1", 0.1),  # the default file has no such section: it is made
        ("vocab_size=null", None),
        ("profile.steps=10:12", "10:12"),  # 612 to YAML 1.1, which counts in sixties
        ("profile.steps=7", "7"),
    ],
)
def test_override(override: str, expected: Any) -> None:
    assert value_at(load_config(None, [override]), override.partition("=")[0]) == expected


def test_projections_with_adapters_are_a_set_whatever_the_order() -> None:
    one, other = (load_config(None, [f"lora.targets={words}"]).lora for words in ("[v_proj, q_proj, v_proj]", "q_proj"))
    assert one is not None and one.targets == ("q_proj", "v_proj")
    assert other is not None and other.targets == ("q_proj",)
    assert "'q_proj', 'k_proj'" in refusal("lora.targets=all")


@pytest.mark.parametrize(("steps", "span"), [("10:12", [10, 11, 12]), ("3", [3]), ("null", [])])
def test_profiled_steps_include_the_last(steps: str, span: list[int]) -> None:
    assert list(load_config(None, [f"profile.steps={steps}"]).profile.span) == span


@pytest.mark.parametrize("steps", ["12:10", "0:3", "some", "1:2:3", "true", "1.5"])
def test_steps_to_profile_that_are_none_are_refused(steps: str) -> None:
    assert refusal(f"profile.steps={steps}").startswith("profile.steps: ")


def test_a_file_that_prometheus_would_not_see_is_refused() -> None:
    message = "report.prometheus: node_exporter reads files that end in .prom alone; name it so"
    assert refusal("report.prometheus=/var/lib/run.txt").startswith(message)


def test_later_override_wins() -> None:
    assert load_config(None, ["stage1.steps=1", "stage1.steps=2"]).stage1.steps == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage1.step=3", "unknown key stage1.step; did you mean stage1.steps?"),
        (
            "specialists.text.templat=hf",
            "unknown key specialists.text.templat; did you mean specialists.text.template?",
        ),
        ("layouts.0.specialists.text.ttp=2", "unknown key layouts.0.specialists.text.ttp; did you mean layouts.0."),
        ("lr=1e-3", "unknown key lr; did you mean stage1.lr or stage2.lr?"),
        ("stage1.gate_lr=1e-3", "unknown key stage1.gate_lr; stage1 is of a kind that has none"),
        ("toy={folder: x, branchd: true}", "unknown key toy.branchd; did you mean toy.branched?"),
        ("nothing_like_it=1", "unknown key nothing_like_it"),
        ("layouts.0.kind=disjunct", "layouts.0.kind is 'disjunct'; use disjoint or colocated"),
        ("stage1.lr=fast", "stage1.lr: expected a number (found 'fast')"),
        ("stage1.steps=1.5", "stage1.steps: expected a whole number (found 1.5)"),
        ("layouts=[{kind: disjoint}]", "layouts.0.specialists is missing; it has no default; a disjoint layout gives"),
        ("layouts.5.specialists={}", "unknown key layouts.5.specialists; layouts.5 is of a kind that has none"),
    ],
)
def test_unknown_key_is_named_with_the_nearest_known_one(override: str, message: str) -> None:
    assert refusal(override).startswith(message)


def test_misspelt_required_key_is_reported_as_misspelt_rather_than_missing(tmp_path: Path) -> None:
    tree = yaml.safe_load(default_config_text())
    tree["stage1"]["step"] = tree["stage1"].pop("steps")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(InputError, match=r"c\.yaml: unknown key stage1\.step; did you mean stage1\.steps\?"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("stage1.steps=-1", ("stage1.steps", "-1")),
        ("stage1.steps=many", ("stage1.steps", "'many'")),
        ("stage1.lr=0", ("stage1.lr", "0")),
        ("stage1.lr=inf", ("stage1.lr", "finite", "'inf'")),
        ("dtype=fp16", ("dtype", "'fp32' or 'bf16'", "'fp16'")),
        ("loss.label_smoothing=1", ("loss.label_smoothing", "less than 1", "found 1")),
        ("layouts.0.specialists.text.tp=0", ("layouts.0.specialists.text.tp", "found 0")),
        ("layouts.0.kind=both", ("layouts.0.kind", "'both'", "disjoint or colocated")),
        ("layouts.0={tp: 2}", ("layouts.0.kind is missing", "disjoint or colocated")),
        ("data.sampling=even", ("data.sampling: use balanced, iid, tokens, or the classes' weights", "'even'")),
        ("data.sampling={text: 1, code: 1}", ("data: sampling weighs text, code; ", "exactly text, code, math")),
        ("data.sampling={text: 1, code: -1, math: 1}", ("data.sampling: code has the weight -1", "at least 0")),
        ("data.sampling={text: 0, code: 0, math: 0}", ("data.sampling: no class has a weight",)),
        ("stage2=5", ("stage2", "expected keys and values", "found 5")),
        ("stage2={steps: 5}", ("stage2.samples_per_class is missing",)),
        ("name=a/b", ("name", "'a/b'")),
        ("name=1.10", ("name: YAML makes 1.1 of", "quotes")),  # a run of another name
        ("name=010", ("name: YAML makes 8 of", "quotes")),
        ("name=2026-01-02", ("name: YAML makes 2026-01-02 of", "quotes")),
        ("specialists.text.path=1.10", ("specialists.text.path: YAML makes 1.1 of", "quotes")),
        ("data.classes.text.columns={a.json: {prompt: 1.10}}", ("columns.a.json.prompt: YAML makes 1.1 of", "quotes")),
        ("data.classes.text.train=[]", ("data.classes.text.train", "at least 1")),
        ("data.max_length=1", ("data.max_length", "greater than or equal to 2", "found 1")),
    ],
)
def test_wrong_value_is_named_with_its_key(override: str, named: tuple[str, ...]) -> None:
    message = refusal(override)
    assert [part for part in named if part not in message] == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage1.steps", "expected key.sub=value"),
        ("=3", "expected key.sub=value"),
        ("name.first=3", "name is a value, not a section"),
        ("data.classes.text.train.0.path=x", "data.classes.text.train.0 is a value, not a section"),
        ("layouts.9.dp=2", "9 is not an index below 6"),
        ("layouts.first.dp=2", "first is not an index below 6"),
    ],
)
def test_override_that_leads_nowhere(override: str, message: str) -> None:
    refused = refusal(override)
    assert repr(override) in refused
    assert message in refused


def test_disjoint_layout_must_place_exactly_the_specialists() -> None:
    message = refusal("layouts.1.specialists={text: {tp: 2}, law: {tp: 2}}")
    assert message == "layouts.1.specialists places text, law; it must place exactly text, code, math"


@pytest.mark.parametrize("name", ["fused", "mean", "shared", "two words", "a.b", "_a", "texte_é"])
@pytest.mark.parametrize("section", ["specialists", "data.classes"])
def test_names_that_reports_and_files_use_themselves_are_refused(section: str, name: str) -> None:
    entry = "{path: x}" if section == "specialists" else "{train: [x.jsonl]}"
    assert f"{name!r} cannot name a specialist or class" in refusal(f"{section}={{{name!r}: {entry}}}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1,", "not valid YAML"),
        ("a: 2024-13-45", "not valid YAML: month must be in 1..12"),
        ("a: " + "[" * 5000, "not valid YAML"),
        ("name: {{ name }}", "not valid YAML: .*unhashable key"),  # somebody's template, not filled in
        ("? [a]\n: 1\n", "not valid YAML: .*unhashable key"),
        ("- 1\n- 2\n", "expected keys and values at the top level"),
        ("", "expected keys and values at the top level"),
    ],
)
def test_file_that_is_no_configuration(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load_config(tmp_path / "c.yaml")
    assert str(tmp_path / "c.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file() -> None:
    with pytest.raises(InputError, match=r"--config nowhere\.yaml: no such file"):
        load_config(Path("nowhere.yaml"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage1.lr=1e-3", "stage1.min_lr=0.1"], r"^stage1\.min_lr: 0\.1 is more than stage1\.lr, 0\.001; make it"),
        (["stage1.steps=3"], r"^stage1\.warmup_steps: 5 is more than the stage's 3 steps, .* to 3 or less$"),
        (["stage1.schedule=constant", "stage1.min_lr=1e-5"], r"^stage1\.min_lr: 1e-05 is never reached .*constant"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused_by_name(overrides: list[str], message: str) -> None:
    stage = load_config(None, overrides).stage1  # what a run was may be read: it was followed somehow
    with pytest.raises(InputError, match=message):
        stage.check_schedule("stage1")


def test_two_rates_for_the_gate_are_refused() -> None:
    stage = load_config(None, ["stage2.gate_lr=0.01", "stage2.train.gate.lr=0.001"]).stage2
    with pytest.raises(
        InputError, match=r"^stage2\.gate_lr: 0\.01, and stage2\.train\.gate\.lr: 0\.001; leave one out$"
    ):
        check_parts({2: stage}, Optimizer(), ["text"])


@pytest.mark.parametrize(
    ("number", "train", "message"),
    [
        (2, "{gate: {mode: frozen, lr: 1e-3}}", "stage2.train.gate: is frozen, and lr would do nothing"),
        (1, "{heads: {lr: 1e-3, weight_decay: 0}}", "stage1.train.heads: is frozen, and lr, weight_decay would"),
        (1, "{specialists: {warmup_steps: 3}}", "stage1.train.specialists: is frozen, and warmup_steps would"),
    ],
)
def test_rates_of_what_is_frozen_are_refused(number: int, train: str, message: str) -> None:
    config = load_config(None, [f"stage{number}.train={train}"])
    with pytest.raises(InputError, match=f"^{re.escape(message)}.*; set its mode, or leave it out$"):
        check_parts({number: {1: config.stage1, 2: config.stage2}[number]}, Optimizer(), ["text"])


def test_a_stage_without_steps_is_none_of_the_runs_stages() -> None:
    config = load_config(None, ["stage1.steps=0", "stage1.min_lr=1.0"])  # nor does it matter what its schedule would be
    assert config.stages == {2: config.stage2}
    assert list(load_config(None).stages) == [1, 2]


def test_a_path_alone_stands_for_the_usual_toy_trio_there() -> None:
    assert load_config(None, ["toy=there"]).toy == Toy(folder=Path("there"))
    assert load_config(None, ["toy={folder: there, branched: true}"]).toy == Toy(folder=Path("there"), branched=True)
    assert load_config(None, ["toy=null"]).toy is None
