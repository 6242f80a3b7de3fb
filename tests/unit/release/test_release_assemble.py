"""What stands in a release folder beside its weights, and what is refused before anything is released."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.release_folder import PIECES, card_facts, write_specialist
from transformers import PreTrainedTokenizerFast

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.release import assemble_release
from ultrafuser_mega.release.assemble import CODE


def assemble(out: Path, specialists: Any, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"vocab_size": PIECES, "gate_units": 8, "gate_shared": False, "dtype": torch.bfloat16}
    return assemble_release(out, specialists, **(arguments | changes), card=card_facts())


@pytest.fixture
def copies(specialists: Any, tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """The llamas, in folders that a test may change."""
    members = {}
    for name, (folder, template) in specialists["llamas"].items():
        shutil.copytree(folder, tmp_path / "specialists" / name)
        members[name] = (tmp_path / "specialists" / name, template)
    return members


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_folder_holds_configuration_code_tokenizer_templates_and_card(copies: Any, tmp_path: Path) -> None:
    assemble(tmp_path / "out", copies)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "chat_templates",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        *CODE,
    }


def test_code_is_copied_verbatim_and_needs_nothing_but_torch_and_transformers(releases: Any) -> None:
    allowed = {"torch", "transformers", *sys.stdlib_module_names, *(Path(file).stem for file in CODE)}
    for file in CODE:
        text = (releases["llamas"] / file).read_text()
        assert text == CODE[file].read_text()
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed


@pytest.mark.parametrize("trio", ["llamas", "qwens"])
def test_every_field_of_a_specialists_configuration_is_kept_but_a_tie_is_undone(
    releases: Any, specialists: Any, trio: str
) -> None:
    config = json.loads((releases[trio] / "config.json").read_text())
    for entry in config["specialists"]:
        own = json.loads((specialists[trio][entry["name"]][0] / "config.json").read_text())
        if own["tie_word_embeddings"]:
            own["tie_word_embeddings"] = False
        assert entry["config"] == own


def test_the_configuration_says_what_tools_ask_every_model_for(copies: Any, tmp_path: Path) -> None:
    assemble(tmp_path / "out", copies)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [entry["name"] for entry in config["specialists"]] == ["text", "code", "math"]
    expected = {
        "architectures": ["UltraFuserForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_ultrafuser.UltraFuserConfig",
            "AutoModelForCausalLM": "modeling_ultrafuser.UltraFuserForCausalLM",
        },
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "gate_shared": False,
        "gate_units": 8,
        "hidden_size": 96,  # the widest
        "max_position_embeddings": 256,  # the shortest
        "model_type": "ultrafuser",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,  # the deepest
        "pad_token_id": 2,
        "response_lead": " ",
        "tie_word_embeddings": False,
        "vocab_size": PIECES,
    }
    assert {field: config.get(field) for field in expected} == expected


def test_answers_end_as_the_first_template_ends_a_turn_and_stop_at_the_endings_of_the_others(
    specialists: Any, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(specialists["qwens"]["code"][0], tmp_path / "code"))
    chatml = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(chatml.replace("<|im_end|>", "<|endoftext|>"))
    assemble(
        tmp_path / "out", {"code": (folder, "hf")} | {name: specialists["qwens"][name] for name in ("text", "math")}
    )
    read = {
        file: json.loads((tmp_path / "out" / file).read_text()) for file in ("config.json", "generation_config.json")
    }
    assert read["config.json"]["eos_token_id"] == 0
    assert read["generation_config.json"]["eos_token_id"] == [0, 2]
    paper = (tmp_path / "out" / "chat_templates" / "math.jinja").read_text()
    assert "<|endoftext|>" in paper and "eos_token" not in paper, "what all responses end with"


def test_generation_ends_at_training_eos_first_and_takes_no_sampling_settings_over(copies: Any, tmp_path: Path) -> None:
    edit_json(
        copies["text"][0] / "generation_config.json", eos_token_id=[2, 7, PIECES + 3], temperature=0.6, do_sample=True
    )
    assemble(tmp_path / "out", copies)
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    settings = {
        name: value for name, value in settings.items() if name.endswith("_id") or name in ("temperature", "do_sample")
    }
    assert settings == {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 2}


def test_assembling_again_gives_the_same_bytes(copies: Any, tmp_path: Path) -> None:
    def contents() -> Any:
        return {path: path.read_bytes() for path in sorted((tmp_path / "out").rglob("*")) if path.is_file()}

    assemble(tmp_path / "out", copies)
    before = contents()
    assemble(tmp_path / "out", copies)
    assert contents() == before


def test_licence_files_travel_with_the_model(copies: Any, tmp_path: Path) -> None:
    (copies["code"][0] / "LICENSE.txt").write_text("LLAMA 2 COMMUNITY LICENSE AGREEMENT\n")
    (copies["code"][0] / "USE_POLICY.md").write_text("# Acceptable use\n")
    assemble(tmp_path / "out", copies)
    copied = sorted(
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out" / "licenses").rglob("*.*")
    )
    assert copied == ["licenses/code/LICENSE.txt", "licenses/code/USE_POLICY.md"]


def refusal(out: Path, specialists: Any, **changes: Any) -> str:
    with pytest.raises(InputError) as caught:
        assemble(out, specialists, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_released_is_refused_in_one_line(copies: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "hidden sizes differ" in refusal(out, copies, gate_shared=True)
    assert f"vocab_size: {PIECES + 1} is more than the {PIECES} rows" in refusal(out, copies, vocab_size=PIECES + 1)
    assert 'template "vicuna" is not known' in refusal(out, copies | {"code": (copies["code"][0], "vicuna")})
    assert "specialists.train: PyTorch keeps this name" in refusal(out, {"train": copies["text"]})
    edit_json(copies["code"][0] / "config.json", model_type="gemma2")
    assert "specialists.code.config.model_type: 'gemma2' is not supported" in refusal(out, copies)
    (copies["math"][0] / "config.json").write_text("{")
    assert "math/config.json: not valid JSON" in refusal(out, copies)
    (copies["text"][0] / "config.json").unlink()
    assert "text/config.json: cannot be read: No such file" in refusal(out, copies)


def test_specialists_of_different_tokenizer_families_are_refused(specialists: Any, tmp_path: Path) -> None:
    mixed = {"text": specialists["llamas"]["text"], "code": specialists["qwens"]["code"]}
    assert "fusing needs specialists of one tokenizer family" in refusal(tmp_path / "out", mixed)


def test_one_specialist_is_a_fused_model_too(tmp_path: Path) -> None:
    folder = write_specialist(tmp_path / "only", "llama", vocab_rows=PIECES, hidden_size=32, seed=0)
    assert assemble(tmp_path / "out", {"only": (folder, "ultralm")}, gate_shared=True).names == ["only"]


def test_the_tokenizer_pads_with_a_token_that_the_model_has(copies: Any, tmp_path: Path) -> None:
    path = copies["text"][0] / "tokenizer_config.json"
    edit_json(path, pad_token="[PAD]", added_tokens_decoder={str(PIECES): {"content": "[PAD]", "special": True}})
    assemble(tmp_path / "out", copies)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert tokenizer.pad_token_id == json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] < PIECES
    assert tokenizer(["a", "a b c d"], padding=True, return_tensors="pt").input_ids.max() < PIECES
