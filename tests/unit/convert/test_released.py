"""A release comes back: as a checkpoint that holds it bit for bit, and that a run begins with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.release_folder import PIECES, write_release, write_specialist
from support.trio import ONE, config_tree

from ultrafuser_mega.checkpoint.sources import SourceFiles, read_sources
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.convert.export import export
from ultrafuser_mega.convert.importer import import_specialists, plan_release
from ultrafuser_mega.convert.shards import LEDGER
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.runtime.layout import plan_colocated

LICENCE = "Some Licence 1.0\nmore\n"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three specialists of three widths, one with its own chat templates; read only."""
    root = tmp_path_factory.mktemp("released")
    members: dict[str, tuple[Path, str]] = {}
    for seed, (name, family, rows, width, template) in enumerate(
        (
            ("text", "llama", PIECES, 64, "ultralm"),
            ("code", "llama", PIECES + 16, 48, "codellama"),
            ("math", "llama", PIECES + 1, 96, "hf"),
        )
    ):
        folder = write_specialist(root / name, family, vocab_rows=rows, hidden_size=width, seed=seed)
        members[name] = (folder, template)
    (root / "math" / "LICENSE").write_text(LICENCE)
    (root / "code" / "README.md").write_text("---\nlicense: llama2\n---\n# Code\n")
    (root / "math" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '\\n' }}{% endfor %}"
    )
    (root / "math" / "additional_chat_templates").mkdir()
    (root / "math" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 'tools' }}")
    return write_release(root / "release", members)


@pytest.fixture(scope="module")
def checkpoint(release: Path) -> Path:
    """Of that release, written by two ranks, over which 24 units of the gate are spread; read only."""
    out = release.with_name("checkpoint")
    plan = plan_release(release, None)
    import_specialists(plan, out, plan_colocated(list(plan.architectures), tp=2, pp=1, dp=1))
    return out


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_release_comes_back_bit_for_bit(release: Path, checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "again", verify=False)
    before, after = (load_file(folder / "model.safetensors") for folder in (release, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(
        after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items()
    )
    ours, theirs = bytes_of(tmp_path / "again"), bytes_of(release)
    for files in (ours, theirs):  # compared above; which export it was is its own
        files.pop("model.safetensors")
        files.pop(LEDGER, None)
    assert ours == theirs
    assert ours["licenses/math/LICENSE"].decode() == LICENCE
    assert ours["chat_templates/math/tool_use.jinja"] == b"{{ 'tools' }}"


def test_one_specialist_of_a_release_leaves_the_checkpoint_as_a_folder(
    release: Path, checkpoint: Path, tmp_path: Path
) -> None:
    export(checkpoint, tmp_path / "math", "specialist:math")
    (entry,) = [e for e in json.loads((release / "config.json").read_text())["specialists"] if e["name"] == "math"]
    assert json.loads((tmp_path / "math" / "config.json").read_text()) == entry["config"]
    assert (tmp_path / "math" / "LICENSE").read_text() == LICENCE


def run_over(trio: Path, root: Path, settings: dict[str, Any]) -> FuserConfig:
    """A configuration with what import prints in it."""
    return FuserConfig.model_validate(config_tree(trio, root / "runs", ONE) | settings)


def test_a_run_begins_with_what_import_says(trio: Path, release: Path, checkpoint: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load(yaml.safe_dump(plan_release(release, None).settings(checkpoint)))
    assert settings["gate"] == {"hidden_size": 24}
    assert {name: part["template"] for name, part in settings["specialists"].items()} == {
        "text": "ultralm",
        "code": "codellama",
        "math": "hf",
    }
    plan = preflight(run_over(trio, tmp_path, settings), 1, resume=False)
    assert plan.start is not None and plan.start[1] == checkpoint
    assert plan.notices == ()
    files = SourceFiles.of_checkpoint(checkpoint, plan.config, trained=()).files
    assert files["sources/math/LICENSE"].decode() == LICENCE
    assert "sources/config.yaml" in files and "sources/README.md" not in files  # its card is the new run's


def test_a_trained_start_comes_in_the_types_of_its_training(checkpoint: Path, trio: Path, release: Path) -> None:
    """Else an untrained specialist of the second run would be rounded to what it was long ago."""
    narrow = {name: dict.fromkeys(source.dtypes, "bfloat16") for name, source in read_sources(checkpoint).items()}
    copy = Path(shutil.copytree(checkpoint, checkpoint.with_name("narrow")))
    record = json.loads((copy / "sources.json").read_text())
    for name, types in narrow.items():
        record[name]["dtypes"] = types
    (copy / "sources.json").write_text(json.dumps(record))
    config = run_over(trio, checkpoint.parent, plan_release(release, None).settings(copy))
    for trained, expected in ((True, "float32"), (False, "bfloat16")):
        files = SourceFiles.of_checkpoint(copy, config, trained=config.specialists if trained else ()).files
        kept = json.loads(files["sources.json"])
        assert {dtype for entry in kept.values() for dtype in entry["dtypes"].values()} == {expected}


def test_a_start_of_another_model_is_refused_by_the_key(trio: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^checkpoint\.start: .*checkpoint of another model"):
        preflight(run_over(trio, tmp_path, {"checkpoint": {"start": str(checkpoint)}}), 1, resume=False)
    with pytest.raises(InputError, match=r"^checkpoint\.start: .*gone: no such folder"):
        preflight(run_over(trio, tmp_path, {"checkpoint": {"start": str(tmp_path / "gone")}}), 1, resume=False)


def test_a_template_that_training_does_not_know_is_refused_by_name(release: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(release, tmp_path / "release"))
    fields = json.loads((copy / "config.json").read_text())
    fields["specialists"][0]["template"]["first"] = "Q: {instruction}"
    (copy / "config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=r"specialists\.text\.template = .* is none of ultralm, codellama, wizardmath"):
        plan_release(copy, None)


@pytest.mark.parametrize("tensor", ["gate.b1", "specialists.math.lm_head.weight"])
def test_a_release_in_a_type_that_does_not_hold_a_value_is_refused_by_the_tensor(
    release: Path, tmp_path: Path, tensor: str
) -> None:
    copy = Path(shutil.copytree(release, tmp_path / "release"))
    tensors = load_file(copy / "model.safetensors")
    tensors[tensor].view(-1)[2] = 1e5
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"^{copy}: tensor {tensor}: its largest value, 100000, is beyond float16, "):
        import_specialists(plan_release(copy, torch.float16), tmp_path / "checkpoint")
