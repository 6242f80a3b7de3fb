"""Nothing is rounded in silence: what was rounded on the way in is said at every step, and leaves in a type it has."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import write_family
from support.trio import ONE, config_tree

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.convert.export import export
from ultrafuser_mega.convert.importer import import_specialists, plan_config, plan_folders
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.planning.preflight import preflight


def test_an_import_that_rounds_says_so_and_its_export_claims_no_float32(tmp_path: Path) -> None:
    source = write_family(tmp_path / "source", "qwen3")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    plan = plan_folders({"a": source}, torch.bfloat16)
    before = load_file(source / "model.safetensors")
    assert plan.notices == [
        f"a: {len(before)} float32 tensors rounded to bfloat16; leave out --dtype to keep them as they are"
    ]
    import_specialists(plan, tmp_path / "checkpoint")
    chosen, notice = export(tmp_path / "checkpoint", tmp_path / "out", verify=False)
    assert chosen.endswith("holds one specialist; exported as with --what specialist:a")
    assert (
        notice == f"a: {len(before)} float32 tensors rounded to bfloat16 on the way into the checkpoint, and written so"
    )
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in before.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"


def test_a_release_of_rounded_specialists_says_so_on_its_card(trio: Path, tmp_path: Path) -> None:
    config = FuserConfig.model_validate(config_tree(trio, tmp_path / "runs", ONE))
    import_specialists(plan_config(config, torch.bfloat16), tmp_path / "checkpoint")
    notices = export(tmp_path / "checkpoint", tmp_path / "release", verify=False)
    assert [notice.split(":")[0] for notice in notices] == ["text", "code", "math"]
    card = (tmp_path / "release" / "README.md").read_text()
    assert "| code | " in (section := card[card.index("## Rounding") : card.index("## Results")])
    assert section.count("float32 tensors rounded to bfloat16") == 3
    assert {tensor.dtype for tensor in load_file(tmp_path / "release" / "model.safetensors").values()} == {
        torch.bfloat16
    }


def test_a_plan_says_what_it_will_round_and_untie(trio: Path, tmp_path: Path) -> None:
    tree = config_tree(trio, tmp_path / "runs", ONE)
    for specialist in tree["specialists"].values():
        specialist["template"] = "hf"
    assert preflight(FuserConfig.model_validate(tree), 1, resume=False).notices == ()
    shutil.copytree(trio / "text", tmp_path / "tied")
    fields = json.loads((tmp_path / "tied" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "tied" / "config.json").write_text(json.dumps(fields))
    tree["specialists"]["text"]["path"] = str(tmp_path / "tied")
    rounds = preflight(FuserConfig.model_validate(tree | {"dtype": "bf16"}), 1, resume=False).notices
    said = {line.split(":")[0] for line in rounds if "float32 tensors rounded to bfloat16 (dtype: bf16)" in line}
    assert said == {f"specialists.{name}" for name in ("text", "code", "math")}
    (untied,) = [line for line in rounds if "ties the output head" in line]
    assert untied.startswith("specialists.text: ") and "stage 2 trains them apart" in untied
    tree["stage2"]["steps"] = 0
    assert preflight(FuserConfig.model_validate(tree), 1, resume=False).notices == ()


@pytest.mark.parametrize("what", ["specialist:a", None])
def test_a_second_process_exporting_to_the_same_name_is_refused(tmp_path: Path, what: str | None) -> None:
    import_specialists(plan_folders({"a": write_family(tmp_path / "source", "llama")}, None), tmp_path / "checkpoint")
    unfinished = tmp_path / ".out.partial"
    unfinished.mkdir()
    other = os.open(unfinished, os.O_RDONLY)  # as the first process holds it
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        for resume in (False, True):
            with pytest.raises(InputError, match=r"\.out\.partial: another process writes to this name"):
                export(tmp_path / "checkpoint", tmp_path / "out", what, resume=resume, verify=False)
    finally:
        os.close(other)
    assert list(unfinished.iterdir()) == []
    export(tmp_path / "checkpoint", tmp_path / "out", what, resume=True, verify=False)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_import_of_a_run_holds_the_runs_own_type_so_that_its_gate_is_not_rounded(trio: Path, tmp_path: Path) -> None:
    tree = config_tree(trio, tmp_path / "runs", ONE)
    for name in ("text", "code", "math"):
        folder = shutil.copytree(trio / name, tmp_path / "bf16" / name)
        tensors = load_file(folder / "model.safetensors")
        save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, folder / "model.safetensors")
    tree["models"] = str(tmp_path / "bf16")
    for dtype, held in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        config = FuserConfig.model_validate(tree | {"dtype": dtype})
        assert plan_config(config, None).dtype == held


@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_an_import_into_a_type_that_does_not_hold_a_value_is_refused_by_the_tensor(tmp_path: Path, tensor: str) -> None:
    source = write_family(tmp_path / "source", "llama")
    tensors = load_file(source / "model.safetensors")
    tensors[tensor].view(-1)[3:5] = torch.tensor([66000.0, -70000.0])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as caught:
        import_specialists(plan_folders({"a": source}, torch.float16), tmp_path / "checkpoint")
    assert str(caught.value) == (
        f"{source}: tensor {tensor}: its largest value, 70000, is beyond float16, which ends at 65504; use fp32 or bf16"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
