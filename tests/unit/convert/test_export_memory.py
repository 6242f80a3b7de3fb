"""What an export needs of memory: one tensor and a little, measured on a model of 2 GB in a process of its own."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen2Config

from ultrafuser_mega.convert.importer import import_specialists, plan_folders
from ultrafuser_mega.models.hf_folder import hf_shapes, read_architecture

GIB = 2**30
LIMIT = 1.5e9

_EXPORT = """
import json, sys
from pathlib import Path
from ultrafuser_mega.convert.export import export

def peak():  # bytes; pages of mapped files count
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

imported = peak()
export(Path(sys.argv[1]), Path(sys.argv[2]), "specialist:a", verify=False)
print(json.dumps([imported, peak()]))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of a model with the shape of small Qwens: embedding and head are half of it."""
    root = tmp_path_factory.mktemp("large")
    source = root / "source"
    config = Qwen2Config(
        vocab_size=131072,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=False,
    )
    config.save_pretrained(source)
    shapes = hf_shapes(read_architecture(source))
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    import_specialists(plan_folders({"a": source}, None), root / "checkpoint")
    shutil.rmtree(source)
    yield root / "checkpoint"
    shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_of_two_gigabytes_holds_one_tensor_at_a_time(checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    path = checkpoint / "sources.json"
    record = json.loads(path.read_text())
    record["a"]["dtypes"] = dict.fromkeys(record["a"]["dtypes"], dtype)
    path.write_text(json.dumps(record))
    shapes = hf_shapes(read_architecture(checkpoint / "sources" / "a"))
    width = getattr(torch, dtype).itemsize
    sizes = [math.prod(shape) for shape in shapes.values()]
    assert 4 * sum(sizes) > 2e9
    command = [sys.executable, "-c", _EXPORT, str(checkpoint), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    imported, peak = json.loads(done.stdout)
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    shutil.rmtree(tmp_path / "out")
    assert written > width * sum(sizes)
    print(f"{dtype}: {(peak - imported) / 1e9:.2f} GB beyond {imported / 1e9:.2f} GB after the imports")
    assert peak - imported <= min(LIMIT, width * max(sizes) + GIB)
