"""A damaged release is refused in one line before anything is computed with it: nothing missing is made up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.release_fixtures import TRIOS

from ultrafuser_mega.convert.compare import ModelAddress
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.model import opened_model
from ultrafuser_mega.release.check import check_release

Fields = dict[str, Any]


@pytest.fixture
def folder(releases: dict[str, Path], tmp_path: Path) -> Path:
    """A release to spoil; its specialists have hidden sizes of their own, so a first gate layer each."""
    return Path(shutil.copytree(releases["llamas"], tmp_path / "release"))


def edited(file: str, change: Callable[[Fields], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        fields = json.loads((folder / file).read_text())
        change(fields)
        (folder / file).write_text(json.dumps(fields))

    return spoil


def config(**changes: object) -> Callable[[Path], None]:
    return edited("config.json", lambda fields: fields.update(changes))


def member(place: int, **changes: object) -> Callable[[Path], None]:
    """Changed fields of one specialist's own configuration."""
    return edited("config.json", lambda fields: fields["specialists"][place]["config"].update(changes))


def tensors(change: Callable[[Fields], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def sharded(change: Callable[[Fields], object]) -> Callable[[Path], None]:
    """The same weights behind an index, which is then changed."""

    def spoil(folder: Path) -> None:
        path = (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        weight_map: Fields = dict.fromkeys(load_file(path), path.name)
        change(weight_map)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def removed(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def written(file: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(text)


# Layers: text has 2, code 3, math 2; the first template is one of pieces.
SPOILT = [
    pytest.param(
        member(1, num_hidden_layers=4), r"specialists\.code\.model\.layers\.3\.\S+ is missing", id="more layers"
    ),
    pytest.param(
        member(1, num_hidden_layers=2),
        r"holds the tensor specialists\.code\.model\.layers\.2\.\S+, which config\.json does not call for",
        id="fewer layers",
    ),
    pytest.param(
        member(0, intermediate_size=64),
        r"specialists\.text\.model\.layers\.0\.mlp\.\S+ has shape .*calls for",
        id="mlp width",
    ),
    pytest.param(
        config(vocab_size=401), r"config\.json: vocab_size = 401 is more than the 400 rows of specialists\.text", id="V"
    ),
    pytest.param(config(vocab_size=None), r"config\.json: vocab_size = None; expected a positive", id="no V"),
    pytest.param(
        member(2, model_type="gpt2"), r"specialists\.math\.config: model_type = 'gpt2' is not supported", id="family"
    ),
    pytest.param(member(2, hidden_act="gelu"), r"specialists\.math\.config: hidden_act = 'gelu' is not", id="act"),
    pytest.param(config(specialists=None), r"config\.json: specialists = None; expected a list", id="no specialists"),
    pytest.param(config(specialists=[7]), r"specialists\[0\]\.name = None; expected a name", id="entry is a number"),
    pytest.param(
        edited("config.json", lambda fields: fields["specialists"][1].update(name="text")),
        r"specialists\[1\]\.name = 'text'; expected a name of its own",
        id="same name twice",
    ),
    pytest.param(
        edited("config.json", lambda fields: fields["specialists"][0].pop("template")),
        r"specialists\.text\.template = None; expected an object",
        id="no template",
    ),
    pytest.param(
        edited("config.json", lambda fields: fields["specialists"][0]["template"].pop("later")),
        r"specialists\.text\.template\.later = None; expected a text",
        id="half a template",
    ),
    pytest.param(
        config(gate_units=25), r"gate\.w1\.text has shape \(24, 64\), .*calls for \(25, 64\)", id="gate units"
    ),
    pytest.param(config(gate_shared=True), r"gate_shared = true, but hidden sizes differ", id="gate shared"),
    pytest.param(config(dtype="banana"), r"config\.json: ", id="dtype"),
    pytest.param(config(quantization_config={"quant_method": "awq"}), r"quantization_config is not", id="quantised"),
    pytest.param(written("config.json", "{"), r"config\.json: not valid JSON", id="config cut"),
    pytest.param(written("config.json", "[]"), r"config\.json: holds a list; expected a JSON object", id="config list"),
    pytest.param(
        tensors(lambda held: held.pop("specialists.text.lm_head.weight")),
        r"tensor specialists\.text\.lm_head\.weight is missing",
        id="no head",
    ),
    pytest.param(tensors(lambda held: held.pop("gate.b1")), r"tensor gate\.b1 is missing", id="no gate bias"),
    pytest.param(
        tensors(lambda held: held.update({"gate.b1": held["gate.b1"].int()})),
        r"tensor gate\.b1 is I32; expected fp32, bf16 or fp16",
        id="whole numbers",
    ),
    pytest.param(
        sharded(lambda weight_map: weight_map.pop("gate.w2")), r"tensor gate\.w2 is missing", id="index lacks an entry"
    ),
    pytest.param(
        sharded(lambda weight_map: weight_map.update({"gate.w2": "model-2.safetensors"})),
        r"model-2\.safetensors: named by the index but missing",
        id="index names a file",
    ),
    pytest.param(
        sharded(lambda weight_map: weight_map.update({"gate.w2": 7})),
        r"model\.safetensors\.index\.json: weight_map names 7 for tensor gate\.w2; expected the name of a file",
        id="index holds a number",
    ),
    pytest.param(removed("tokenizer.json"), r"tokenizer\.json: missing", id="no tokenizer"),
    pytest.param(written("tokenizer.json", "{"), r"tokenizer\.json: not valid JSON", id="tokenizer cut"),
    pytest.param(written("tokenizer.json", "{}"), r"tokenizer\.json: damaged", id="tokenizer empty"),
    pytest.param(
        edited("tokenizer_config.json", lambda fields: fields.pop("eos_token")),
        r"tokenizer_config\.json: eos_token is missing",
        id="no EOS",
    ),
    pytest.param(removed("generation_config.json"), r"generation_config\.json: missing", id="no generation config"),
    pytest.param(written("generation_config.json", "{"), r"generation_config\.json: not valid", id="generation cut"),
    pytest.param(
        edited("generation_config.json", lambda fields: fields.update(eos_token_id=400)),
        r"generation_config\.json: eos_token_id = 400; expected tokens of the vocabulary of 400",
        id="EOS beyond the vocabulary",
    ),
    pytest.param(
        edited("generation_config.json", lambda fields: fields.update(eos_token_id=None)),
        r"generation_config\.json: eos_token_id = None",
        id="no end",
    ),
]


@pytest.mark.parametrize("trio", TRIOS)
def test_a_whole_release_passes_with_its_configuration(releases: dict[str, Path], trio: str) -> None:
    assert check_release(releases[trio]).names == ["text", "code", "math"]


@pytest.mark.parametrize(("spoil", "named"), SPOILT)
def test_a_damaged_release_is_neither_answered_from_nor_compared(
    folder: Path, spoil: Callable[[Path], object], named: str
) -> None:
    spoil(folder)
    for use in (lambda: ModelAddress.parse(str(folder)), lambda: opened_model(str(folder), "cpu", None).__enter__()):
        with pytest.raises(InputError, match=named) as caught:
            use()
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_what_transformers_itself_refuses_is_one_line(folder: Path) -> None:
    member(0, pad_token_id=10**6)(folder)
    with pytest.raises(InputError, match=r"release: cannot be loaded \(Padding_idx") as caught:
        opened_model(str(folder), "cpu", None).__enter__()
    assert "\n" not in str(caught.value)


def test_fields_left_out_are_as_by_default(releases: dict[str, Path], tmp_path: Path) -> None:
    """transformers writes no field that has its default."""
    folder = Path(shutil.copytree(releases["qwens"], tmp_path / "release"))
    edited("config.json", lambda fields: [fields.pop(field, None) for field in ("gate_shared", "response_lead")])(
        folder
    )
    config = check_release(folder)
    assert config.gate_shared and config.response_lead == ""


def test_a_specialists_own_tokenizer_is_checked_too(folder: Path) -> None:
    own = folder / "tokenizers" / "math"
    own.mkdir(parents=True)
    for path in folder.glob("*token*.json"):
        shutil.copyfile(path, own / path.name)
    edited("config.json", lambda fields: fields["specialists"][2].update(tokenizer="tokenizers/math"))(folder)
    assert check_release(folder).entry("math")["tokenizer"] == "tokenizers/math"
    (own / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizers/math/tokenizer\.json: missing"):
        check_release(folder)
