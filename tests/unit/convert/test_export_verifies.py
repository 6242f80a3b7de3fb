"""An export compares itself with its checkpoint before it gets its name, and a wrong one never gets it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.families import write_family
from torch import Tensor

from ultrafuser_mega.checkpoint.checkpoint import PROGRESS
from ultrafuser_mega.checkpoint.sources import CONFIG
from ultrafuser_mega.convert.compare import DifferentModel
from ultrafuser_mega.convert.export import export
from ultrafuser_mega.convert.importer import import_specialists, plan_folders
from ultrafuser_mega.convert.restore import RestoredSpecialist
from ultrafuser_mega.errors import InputError

WHAT = "specialist:a"
ROUNDING = (
    1e-5  # of two layers of sums of up to 96 terms: some 2 * 2^-24 * sqrt(2 * 4 * 96) = 3e-6 of the largest logit
)


def train_a_little(source: Path) -> None:
    """Stands for training in fp32: a change that bf16 cannot hold."""
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    noisy = {
        name: tensor.float() * (1 + 0.05 * torch.randn(tensor.shape, generator=generator))
        for name, tensor in tensors.items()
    }
    save_file(noisy, source / "model.safetensors", metadata={"format": "pt"})


def relative(notice: str) -> float:
    found = re.fullmatch(
        r"verified on a text of \d+ tokens: largest difference of a float32 logit \S+, (\S+) of the largest logit",
        notice,
    )
    assert found is not None, notice
    return float(found[1])


def checkpoint_of(folder: Path, out: Path) -> Path:
    import_specialists(plan_folders({"a": folder}, None), out)
    return out


def as_if_trained(checkpoint: Path, came_as: str) -> None:
    """Make the checkpoint one of stage 2 whose specialist came with other element types than it was trained in."""
    path = checkpoint / "sources.json"
    record = json.loads(path.read_text())
    record["a"]["dtypes"] = dict.fromkeys(record["a"]["dtypes"], came_as)
    path.write_text(json.dumps(record))
    path = checkpoint / PROGRESS
    record = json.loads(path.read_text())
    record["progress"] |= {"stage": 2, "step": 3}
    path.write_text(json.dumps(record))
    run = {
        "specialists": {"a": {"path": "a", "template": "hf"}},
        "layouts": [{"kind": "colocated"}],
        "data": {"root": "data", "classes": {"text": {"train": ["a.jsonl"], "heldout": ["b.jsonl"]}}},
        "stage1": {"steps": 0, "samples_per_class": 1, "lr": 1e-3},
        "stage2": {"steps": 3, "samples_per_class": 1, "lr": 1e-3},
    }
    (checkpoint / CONFIG).write_text(yaml.safe_dump(run))


@pytest.mark.parametrize("case", ["codellama", "qwen2_tied", "qwen3"])
def test_export_says_how_close_it_came(tmp_path: Path, case: str) -> None:
    checkpoint = checkpoint_of(write_family(tmp_path / "source", case), tmp_path / "checkpoint")
    *_, notice = export(checkpoint, tmp_path / "out", WHAT)
    assert relative(notice) <= ROUNDING
    assert (tmp_path / "out" / "config.json").is_file()


def test_trained_specialist_leaves_in_the_type_that_it_was_trained_in(tmp_path: Path) -> None:
    source = write_family(tmp_path / "source", "qwen2")
    train_a_little(source)
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config))
    checkpoint = checkpoint_of(source, tmp_path / "checkpoint")
    as_if_trained(checkpoint, came_as="bfloat16")
    (notice,) = export(checkpoint, tmp_path / "out", WHAT)
    assert relative(notice) <= ROUNDING
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"dtype": "float32"}


def test_checkpoint_in_bf16_is_compared_as_it_is(tmp_path: Path) -> None:
    source = write_family(tmp_path / "source", "mistral", dtype=torch.bfloat16)
    (notice,) = export(checkpoint_of(source, tmp_path / "checkpoint"), tmp_path / "out", WHAT)
    assert relative(notice) <= ROUNDING


def swap_key_and_value(self: RestoredSpecialist, tensor: str) -> Tensor:
    """Equal in shape, so nothing but a comparison of what is computed can tell."""
    return READ(self, tensor.replace("k_proj", "v_proj") if "layers.1" in tensor else tensor)


def lose_a_number(self: RestoredSpecialist, tensor: str) -> Tensor:
    value = READ(self, tensor).clone()
    value.view(-1)[0] = torch.nan
    return value


READ = RestoredSpecialist.read


@pytest.mark.parametrize("read", [swap_key_and_value, lose_a_number])
def test_wrong_export_keeps_its_hidden_name_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: object
) -> None:
    checkpoint = checkpoint_of(write_family(tmp_path / "source", "llama"), tmp_path / "checkpoint")
    monkeypatch.setattr(RestoredSpecialist, "read", read)
    out, unfinished = tmp_path / "out", tmp_path / ".out.partial"
    with pytest.raises(DifferentModel) as caught:
        export(checkpoint, out, WHAT)
    message = str(caught.value)
    assert message.startswith(f"{unfinished}: computes something else than {checkpoint} on a text of ")
    assert message.endswith("it stays unfinished under this name") and "\n" not in message
    assert not out.exists() and (unfinished / "model.safetensors").is_file()
    with pytest.raises(DifferentModel):  # going on does not help what is wrong
        export(checkpoint, out, WHAT, resume=True)
    assert export(checkpoint, out, WHAT, resume=True, verify=False) == []
    assert out.is_dir() and not unfinished.exists()


def test_checkpoint_without_a_tokenizer_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = write_family(tmp_path / "source", "llama")
    for path in source.glob("*token*"):
        path.unlink()
    checkpoint = checkpoint_of(source, tmp_path / "checkpoint")
    with pytest.raises(InputError, match=r"holds no tokenizer; add its .*; --no-verify exports without"):
        export(checkpoint, tmp_path / "out", WHAT)
    assert not (tmp_path / ".out.partial").exists()
    assert export(checkpoint, tmp_path / "out", WHAT, verify=False) == []


def test_too_little_memory_for_the_comparison_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = checkpoint_of(write_family(tmp_path / "source", "llama"), tmp_path / "checkpoint")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**9))
    with pytest.raises(InputError, match=r"needs 1\.6 GB of memory, 1\.0 are free; export with --no-verify"):
        export(checkpoint, tmp_path / "out", WHAT)
    assert not (tmp_path / ".out.partial").exists()
    assert export(checkpoint, tmp_path / "out", WHAT, verify=False) == []
