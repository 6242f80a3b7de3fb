"""What a checkpoint keeps beside the weights, and in which element types tensors come and go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ultrafuser_mega.checkpoint.sources import Sources, held_type, rounding

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def test_sub_folders_are_kept_and_weights_and_hidden_ones_are_not(tmp_path: Path) -> None:
    kept = ("config.json", ".gitattributes", "additional_chat_templates/tool_use.jinja", "original/params.json")
    for name in (*kept, "original/consolidated.00.pth", "onnx/model.onnx_data", ".git/config", "pytorch_model.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    files = Sources({"a": tmp_path}, {"a": "hf"}, None).read().files
    assert {name: files[name].decode() for name in files if name != "sources.json"} == {
        f"sources/a/{name}": name for name in kept
    }


@pytest.mark.parametrize(
    ("types", "into", "said"),
    [
        ([FP32, BF16, FP16], FP32, ""),
        ([BF16], BF16, ""),
        ([FP32, FP32, BF16], BF16, "2 float32 tensors rounded to bfloat16"),
        ([FP16, FP32], BF16, "1 float16 tensor and 1 float32 tensor rounded to bfloat16"),
        ([BF16], FP16, "1 bfloat16 tensor rounded to float16"),
    ],
)
def test_rounding_names_the_types_that_do_not_fit(types: list[torch.dtype], into: torch.dtype, said: str) -> None:
    assert rounding({str(place): dtype for place, dtype in enumerate(types)}, into) == said


def test_a_tensor_claims_no_more_precision_than_it_has() -> None:
    assert held_type(BF16, FP32, trained=False) == BF16  # widened on loading: leaves as it came
    assert held_type(FP32, BF16, trained=False) == BF16  # rounded on loading: is not float32 any more
    assert held_type(BF16, FP32, trained=True) == FP32  # bf16 would forget small steps


def test_a_resumed_run_keeps_the_element_types_that_its_weights_came_in(tmp_path: Path) -> None:
    """Not those of a folder that was saved anew since: what the checkpoint holds would be rounded on the way out."""
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    sources = Sources({"a": tmp_path}, {"a": "hf"}, None)
    checkpoint = tmp_path / "run" / "stage1-step0000001"
    (checkpoint / "sources" / "a").mkdir(parents=True)
    sources.read().write(checkpoint)
    save_file({"w": torch.zeros(1, dtype=BF16)}, tmp_path / "model.safetensors")
    types = {}
    for name, went_on_from in (("resumed", checkpoint), ("new", None)):
        record = json.loads(sources.read(went_on_from).files["sources.json"])
        types[name] = record["a"]["dtypes"]["w"]
    assert types == {"resumed": "float32", "new": "bfloat16"}
