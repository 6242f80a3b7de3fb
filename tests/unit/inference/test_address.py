"""What a user writes for a model, and which weights are then in memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.trio import ONE, config_tree
from transformers import AutoModelForCausalLM

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.convert.importer import import_specialists, plan_config
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.address import Address
from ultrafuser_mega.inference.model import opened_model


def test_one_specialist_of_a_release_is_opened_alone(release: Path, model: Any) -> None:
    with opened_model(f"{release}@code", "cpu", None) as opened:
        assert opened.model.names == ["code"]
        own = opened.model.specialists["code"].state_dict()
        assert all(
            torch.equal(own[key].to_dense(), value) for key, value in model.specialists["code"].state_dict().items()
        )
        ids = torch.tensor([[5, 6, 7]])
        assert opened.model.gate_weights({"code": opened.model.last_hidden("code", ids)}).eq(1).all()
        chat = [{"role": "user", "content": "Who?"}]
        assert (
            opened.model.chat_ids([chat], opened.tokenizer)[0]["code"]
            == (model.chat_ids([chat], opened.tokenizer)[0]["code"])
        )


def test_answers_of_one_specialist_of_a_checkpoint_end_as_all_were_trained_to(specialists: Any, tmp_path: Path) -> None:
    """Training puts the ending of the first template, here <|endoftext|>, behind every response."""
    folder = Path(shutil.copytree(specialists["qwens"]["code"][0], tmp_path / "code"))
    chatml = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(chatml.replace("<|im_end|>", "<|endoftext|>"))
    tree = config_tree(tmp_path, tmp_path / "runs", ONE)
    math, template = specialists["qwens"]["math"]
    tree["specialists"] = {
        "code": {"path": str(folder), "template": "hf"},
        "math": {"path": str(math), "template": template},
    }
    import_specialists(plan_config(FuserConfig.model_validate(tree), None), tmp_path / "checkpoint")
    with opened_model(f"{tmp_path / 'checkpoint'}@math", "cpu", None) as opened:
        assert opened.model.names == ["math"]
        assert opened.eos == set(opened.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
        ids = torch.tensor([[5, 6, 7]])
        with torch.no_grad(), opened_model(f"{math}@{template}", "cpu", None) as alone:
            assert torch.equal(opened.model(ids).logits, alone.model(ids).logits[..., : opened.model.config.vocab_size])


def test_a_folder_of_one_model_gives_its_own_logits(specialists: Any, close: Any) -> None:
    folder, template = specialists["llamas"]["math"]
    with opened_model(f"{folder}@{template}", "cpu", None) as opened:
        theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            torch.testing.assert_close(opened.model(ids).logits, theirs(ids).logits.float(), **close)


def test_a_rule_stands_behind_a_plus(release: Path) -> None:
    assert Address.parse(f"{release}+uniform").rule == "uniform"
    assert Address.parse(str(release)) == Address(release, "release", None, "gate")
    assert Address.parse(f"{release}@fused").part is None
    assert Address.parse(f"{release}@specialist:text").part == "text"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nowhere", "nowhere: no such folder"),
        ("{release}@poetry", "expected @fused or @ with one of text, code, math"),
        ("{release}+best", r"no rule \+best; expected one of gate, top1"),
        ("{release}@text+uniform", r"one specialist, there is nothing to mix; leave out \+uniform"),
        ("{folder}+uniform", r"is a single model, there is nothing to mix; leave out \+uniform"),
        ("{empty}", "no config.json; expected what ultrafuser export wrote"),
    ],
)
def test_what_is_no_model_is_one_line(
    release: Path, specialists: Any, tmp_path: Path, address: str, message: str
) -> None:
    text = address.format(release=release, folder=specialists["llamas"]["text"][0], empty=tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        Address.parse(text)
    assert "\n" not in str(caught.value)


def test_a_template_that_is_none_is_one_line(specialists: Any) -> None:
    folder, _ = specialists["llamas"]["text"]
    with pytest.raises(InputError, match="@alpaca: expected a template, one of ultralm, codellama, wizardmath, hf"):
        opened_model(f"{folder}@alpaca", "cpu", None).__enter__()
