"""Small checkpoints of adapters: gone on from bit for bit, read under any layout, merged or given to PEFT."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.command import ultrafuser
from support.trio import (
    COLOCATED_TP2_PP2,
    CPU,
    DISJOINT_8,
    DISJOINT_CODE_TP4,
    ONE,
    config_tree,
    read_steps,
    train,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints, load_checkpoint
from ultrafuser_mega.checkpoint.chunks import weights_to_read
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.checkpoint.tensors import CheckpointTensors
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.convert.compare import compare
from ultrafuser_mega.convert.export import export
from ultrafuser_mega.convert.restore import TrainedModel
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.address import Address
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.assembly import build_model

LORA = {"rank": 4, "alpha": 12.0, "dropout": 0.25, "rslora": True}
TIMES = ("seconds", "tokens_per_s", "data_seconds", "memory_bytes", "peak_memory_bytes", "save_seconds", "phases")


def tree_of(trio: Path, runs: Path, layout: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Adapters with dropout in both stages; the head of every specialist trains in the second."""
    tree = config_tree(trio, runs, layout) | {"lora": LORA}
    tree["stage1"] |= {"steps": 2, "train": {"text": "lora"}}
    tree["stage2"] |= {"steps": 2, "lr": 5e-3, "train": {"specialists": "lora", "math": "frozen", "heads": "frozen"}}
    tree["checkpoint"] = {"every": 1, "keep": 20, "weights": "trained"}
    tree["parallel"] = {"sequence_parallel": True, "recompute_layers": 1}
    return tree | more


@pytest.fixture(scope="module")
def whole(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on four ranks; only read and copied."""
    return train(tree_of(trio, tmp_path_factory.mktemp("whole"), COLOCATED_TP2_PP2), 4)


@pytest.mark.parametrize("cut", [Progress(1, 1), Progress(2, 1)])
def test_a_run_goes_on_from_its_adapters_bit_for_bit(trio: Path, tmp_path: Path, whole: Path, cut: Progress) -> None:
    tree = tree_of(trio, tmp_path, COLOCATED_TP2_PP2)
    copy = FuserConfig.model_validate(tree).run_dir
    shutil.copytree(whole, copy)
    for progress, path in list_checkpoints(copy / "checkpoints"):
        if progress > cut:
            shutil.rmtree(path)
    train(tree, 4, resume=True)
    assert [untimed(step) for step in read_steps(copy)] == [untimed(step) for step in read_steps(whole)]
    ends = [list_checkpoints(run / "checkpoints")[-1][1] for run in (copy, whole)]
    again, before = (CheckpointTensors(end) for end in ends)
    assert again.names() == before.names()
    assert all(torch.equal(again.read(name), before.read(name)) for name in before.names())


def untimed(step: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in step.items() if key not in TIMES}


def test_a_small_checkpoint_holds_what_trains_and_nothing_else(whole: Path) -> None:
    end = list_checkpoints(whole / "checkpoints")[-1][1]
    weights = [name for name in CheckpointTensors(end).names() if not name.startswith("optimizer.")]
    assert {name.split(".")[0] for name in weights} == {"gate", "specialists"}
    assert {name.split(".")[1] for name in weights if name.startswith("specialists.")} == {"text", "code"}
    assert all(".adapters." in name for name in weights if name.startswith("specialists."))


@pytest.mark.parametrize(("layout", "ranks"), [(DISJOINT_8, 8), (DISJOINT_CODE_TP4, 6)])
def test_adapters_are_read_under_any_layout(
    trio: Path, whole: Path, layout: dict[str, Any], ranks: int, tmp_path: Path
) -> None:
    end = list_checkpoints(whole / "checkpoints")[-1][1]
    expected = CheckpointTensors(end)
    seen: set[str] = set()
    for pieces in run_ranks(_adapters, ranks, tree_of(trio, tmp_path, layout), end):
        for key, offsets, data in pieces:
            spans = [slice(at, at + size) for at, size in zip(offsets, data.shape, strict=True)]
            assert torch.equal(data, expected.read(key, *spans)), key
            seen.add(key)
    assert seen == {name for name in expected.names() if name.startswith("specialists.")}


def _adapters(rank: int, tree: dict[str, Any], source: Path) -> list[tuple[str, tuple[int, ...], Tensor]]:
    plan = preflight(FuserConfig.model_validate(tree), torch.distributed.get_world_size(), resume=False)
    groups = make_groups(plan.layout)
    model = build_model(plan, groups, CPU)
    load_checkpoint(source, model, groups, None, 0)
    chunks = [chunk for chunk in weights_to_read(model, groups) if ".adapters." in chunk.key]
    return [(chunk.key, chunk.offsets, chunk.data.clone()) for chunk in chunks]


def test_merged_adapters_compute_what_they_did_beside_the_weights(whole: Path, tmp_path: Path) -> None:
    """Export runs both: the checkpoint, whose adapters are beside the weights, and the folder, where they are not."""
    said = export(whole, tmp_path / "fused")
    assert any(line.startswith("verified") for line in said)
    text = load_file(export_of(whole, tmp_path, "specialist:text") / "model.safetensors")
    model = TrainedModel(list_checkpoints(whole / "checkpoints")[-1][1])
    base = load_file(model.specialist("text").source.origin + "/model.safetensors")
    name, scale = "model.layers.1.self_attn.k_proj.weight", 12.0 / 4**0.5
    found = model.specialist("text").adapter(1, "k_proj")
    assert found is not None
    a, b = (matrix.double() for matrix in found)
    merged = base[name].double() + scale * b @ a
    assert b.abs().max() > 0
    assert (text[name] - merged).abs().max() <= 2**-23 * merged.abs().max()
    assert torch.equal(text["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_adapters_merged_into_bfloat16_differ_by_what_that_rounds_and_no_more(trio: Path, tmp_path: Path) -> None:
    tree = tree_of(trio, tmp_path, ONE) | {"dtype": "bf16"}
    tree["stage1"]["steps"] = 0
    run = train(tree, 1)
    assert any(line.startswith("verified") for line in export(run, tmp_path / "fused"))
    out = export_of(run, tmp_path, "specialist:code")
    same = compare(f"{run}@specialist:code", str(out), "Add 2 and 3.")
    assert same.equal and same.tolerance > 2**-12
    turned = compare(str(out), f"{run}@specialist:code", "Add 2 and 3.")
    assert turned.equal and turned.tolerance == pytest.approx(same.tolerance)
    both = compare(str(tmp_path / "fused"), str(run), "Add 2 and 3.")
    assert both.equal and both.tolerance > 2**-12
    tensors = load_file(out / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name] *= 1.25  # of another scale
    (out / "export.json").unlink()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert not compare(f"{run}@specialist:code", str(out), "Add 2 and 3.").equal
    assert not compare(str(out), f"{run}@specialist:code", "Add 2 and 3.").equal


def export_of(run: Path, folder: Path, what: str) -> Path:
    out = folder / what.replace(":", "-")
    export(run, out, what)
    return out


def test_weights_that_are_not_those_left_out_are_refused(whole: Path, trio: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(list_checkpoints(whole / "checkpoints")[-1][1], tmp_path / "stage2-step0000002"))
    other = Path(shutil.copytree(trio / "text", tmp_path / "text"))
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"\1" * 8)
    record = json.loads((copy / "left_out.json").read_text())
    record["text"]["folder"] = str(other)
    (copy / "left_out.json").write_text(json.dumps(record))
    with pytest.raises(
        InputError, match=r"leaves out weights of text, whose file .*model\.safetensors is not what it was"
    ):
        export(copy, tmp_path / "out")
    shutil.rmtree(other)
    with pytest.raises(InputError, match=r"leaves out weights of text that were in .*; no such folder"):
        export(copy, tmp_path / "out")


def test_a_run_that_goes_on_takes_what_is_left_out_from_where_its_configuration_says(
    trio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Moved folders are read where they are now; folders of other weights are refused, wherever the old ones are."""
    moved, other = Path(shutil.copytree(trio, tmp_path / "trio")), Path(shutil.copytree(trio, tmp_path / "other"))
    tree = tree_of(moved, tmp_path, ONE)
    tree["stage1"]["steps"] = 0
    tree["data"]["root"] = str(trio / "data")
    run = train(tree, 1)
    with (other / "math" / "model.safetensors").open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"\1" * 8)
    tree["stage2"]["steps"] = 3
    with pytest.raises(InputError, match=r"leaves out weights of math, whose file .*other/math/model\.safetensors"):
        train(tree | {"models": str(other)}, 1, resume=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    plan = ["plan", "--config", tmp_path / "run.yaml", "--resume"]
    assert ultrafuser(monkeypatch, *plan) == 0
    assert f"checked: weights that it leaves out are as they were in {moved / 'text'}, " in capsys.readouterr().out
    assert ultrafuser(monkeypatch, *plan, f"models={other}") == 2
    assert "leaves out weights of math, whose file" in capsys.readouterr().err
    moved.rename(tmp_path / "elsewhere")
    train(tree | {"models": str(tmp_path / "elsewhere")}, 1, resume=True)
    end = list_checkpoints(run / "checkpoints")[-1][1]
    assert json.loads((end / "left_out.json").read_text())["math"]["folder"] == str(tmp_path / "elsewhere" / "math")
    export(run, tmp_path / "out")


def test_a_run_whose_checkpoints_hold_all_weights_does_not_begin_to_leave_some_out(trio: Path, tmp_path: Path) -> None:
    tree = tree_of(trio, tmp_path, ONE)
    tree["stage1"]["steps"] = 0
    train(tree | {"checkpoint": {"weights": "all"}}, 1)
    with pytest.raises(
        InputError, match=r"^checkpoint\.weights: trained would leave out weights that .*go on with all$"
    ):
        preflight(FuserConfig.model_validate(tree), 1, resume=True)
    with pytest.raises(
        InputError, match=r"adapters\.code\.rank is 4 there and 8 here; give lora and train as that run"
    ):
        preflight(FuserConfig.model_validate(tree | {"lora": LORA | {"rank": 8}}), 1, resume=True)


def test_a_small_checkpoint_and_a_part_of_it_are_read_as_models(whole: Path) -> None:
    for address in (str(whole), f"{whole}@math"):
        with ExitStack() as stack:
            stored = Address.parse(address).stored(stack)
            assert stored.dtype == torch.float32 and stored.load(None).config.names[-1] == "math"


def test_a_specialist_without_adapters_gives_none_to_peft(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--what adapter:math: it has no adapters; use specialist:math"):
        export(whole, tmp_path / "out", "adapter:math")
    assert not list(tmp_path.iterdir())  # nothing that an export of something else would have to go on with


def test_adapters_beside_weights_that_a_checkpoint_gave_are_not_written_for_peft(trio: Path, tmp_path: Path) -> None:
    """PEFT would add them to the folder that those weights came from before they were trained."""
    tuned = train(config_tree(trio, tmp_path, ONE) | {"name": "tuned"}, 1)
    tree = tree_of(trio, tmp_path, ONE, name="adapted")
    tree["stage1"]["steps"] = 0
    for (progress, start), refused in zip(list_checkpoints(tuned / "checkpoints"), (False, True), strict=True):
        tree["checkpoint"] = {"weights": "all", "start": str(start)}
        run, out = train(tree | {"name": f"from{progress.stage}"}, 1), tmp_path / f"code{progress.stage}"
        if refused:
            with pytest.raises(
                InputError, match=r"^--what adapter:code: .* other weights than those in .*specialist:code"
            ):
                export(run, out, "adapter:code")
        else:
            export(run, out, "adapter:code")  # stage 1 trained the gate alone
        assert out.exists() != refused


@pytest.mark.parametrize("heads", ["frozen", "full"])
def test_peft_loads_the_adapters_and_gives_the_merged_models_logits(trio: Path, tmp_path: Path, heads: str) -> None:
    peft = pytest.importorskip("peft")
    tree = tree_of(trio, tmp_path, ONE)
    tree["stage1"]["steps"] = 0
    tree["stage2"]["train"] = {"specialists": "lora", "heads": heads}
    run = train(tree, 1)
    merged, adapter = export_of(run, tmp_path, "specialist:code"), export_of(run, tmp_path, "adapter:code")
    config = json.loads((adapter / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)
    ids = torch.randint(5, 300, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = base(ids).logits
        beside = peft.PeftModel.from_pretrained(base, adapter).eval()(ids).logits
        whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids).logits
    assert (plain - whole).abs().max() > 1e-3 * whole.abs().max()
    assert (beside - whole).abs().max() <= 1e-5 * whole.abs().max()
