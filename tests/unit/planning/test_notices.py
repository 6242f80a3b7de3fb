"""What plan and train say of the specialists' folders before anything is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.trio import ONE, config_tree

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.planning.preflight import preflight

CODELLAMA = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


@pytest.fixture
def copy(trio: Path, tmp_path: Path) -> Path:
    """The trio, of which code brings the chat template of its own that CodeLlama has."""
    folder = shutil.copytree(trio, tmp_path / "trio")
    (folder / "code" / "chat_template.jinja").write_text(CODELLAMA)
    return folder


def notices(trio: Path, tmp_path: Path, template: str) -> str:
    tree = config_tree(trio, tmp_path / "runs", ONE)
    tree["specialists"]["code"]["template"] = template
    found = preflight(FuserConfig.model_validate(tree), 1, resume=False).notices
    return "\n".join(notice for notice in found if notice.startswith("specialists.code"))


def test_a_template_that_is_not_the_folders_own_is_asked_about(copy: Path, tmp_path: Path) -> None:
    assert "specialists.code: template ultralm asks otherwise than the chat template in" in notices(
        copy, tmp_path, "ultralm"
    )
    assert "asks otherwise" not in notices(copy, tmp_path, "codellama")
    assert "asks otherwise" not in notices(copy, tmp_path, "hf")


def test_a_folder_without_a_tokenizer_is_told_what_to_add(copy: Path, tmp_path: Path) -> None:
    for path in (copy / "code").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=r"code: holds no tokenizer; add its tokenizer\.json or tokenizer\.model$"):
        notices(copy, tmp_path, "codellama")


def test_a_large_file_that_every_checkpoint_would_hold_is_named(copy: Path, tmp_path: Path) -> None:
    assert "checkpoint" not in notices(copy, tmp_path, "hf")
    (copy / "code" / "more").mkdir()
    for name in ("rows.arrow", "old.safetensors"):  # weights are left out, whatever else is kept
        with (copy / "code" / "more" / name).open("wb") as file:
            file.truncate(2 * 10**8)
    path = copy / "code" / "more" / "rows.arrow"
    line = f"specialists.code: every checkpoint and export keeps {path} (0.2 GB), which has no name that weights have; "
    assert line in notices(copy, tmp_path, "hf") and "old.safetensors" not in notices(copy, tmp_path, "hf")


def test_replicas_that_no_sample_is_left_for_are_told(trio: Path, tmp_path: Path) -> None:
    tree = config_tree(trio, tmp_path / "runs", {**ONE, "dp": 14})
    tree["stage1"]["samples_per_class"], tree["stage2"]["samples_per_class"] = 5, 4
    found = preflight(FuserConfig.model_validate(tree), 14, resume=False).notices
    assert [line for line in found if "replicas" in line] == [
        "stage 2: 14 replicas for 3 x 4 samples a step: 2 of them have nothing to do"
    ]


def test_settings_of_adapters_that_nothing_trains_are_remarked_on(trio: Path, tmp_path: Path) -> None:
    tree = config_tree(trio, tmp_path / "runs", ONE) | {"lora": {"rank": 4}}
    said = "note: lora: no stage trains adapters; stage2.train={specialists: lora} would"
    assert said in preflight(FuserConfig.model_validate(tree), 1, resume=False).notices
    tree["stage2"]["train"] = {"text": "lora"}
    assert said not in preflight(FuserConfig.model_validate(tree), 1, resume=False).notices
