"""Damaged Hugging Face folders are refused in one line before they are compared: nothing missing is made up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.families import write_family

from ultrafuser_mega.convert.compare import compare
from ultrafuser_mega.errors import InputError


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder; read only."""
    return write_family(tmp_path_factory.mktemp("damaged") / "source", "qwen2")


def config(**changes: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def written(file: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(text)


FEWER = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
MORE = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        pytest.param(config(**MORE), r"tensor model\.layers\.2\.\S+ is missing", id="more layers"),
        pytest.param(config(**FEWER), r"holds the tensor model\.layers\.1\.\S+, which", id="fewer layers"),
        pytest.param(config(intermediate_size=128), r"mlp\.\S+ has shape .*calls for \(128, 64\)", id="mlp width"),
        pytest.param(config(vocab_size=500), r"embed_tokens\.weight has shape \(401, 64\), .*\(500, 64\)", id="V"),
        pytest.param(config(model_type="gpt2"), r"model_type = 'gpt2' is not supported", id="family"),
        pytest.param(config(pad_token_id=10**6), r"spoilt: cannot be loaded \(Padding_idx", id="pad"),
        pytest.param(written("config.json", "{"), r"config\.json: not valid JSON", id="config cut"),
        pytest.param(written("tokenizer.json", "{"), r"no tokenizer can be loaded from here", id="tokenizer cut"),
        pytest.param(written("generation_config.json", "[]"), r"spoilt: cannot be loaded \(", id="generation"),
    ],
)
def test_a_damaged_folder_is_not_compared(
    intact: Path, tmp_path: Path, spoil: Callable[[Path], object], named: str
) -> None:
    folder = Path(shutil.copytree(intact, tmp_path / "spoilt"))
    spoil(folder)
    with pytest.raises(InputError, match=named) as caught:
        compare(str(folder), str(intact), "a b")
    assert "\n" not in str(caught.value)
