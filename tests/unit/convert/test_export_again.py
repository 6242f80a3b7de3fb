"""Exports of exports, exports that go on from others, and places and checkpoints that make an export impossible."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.families import write_family
from support.trio import ONE, config_tree

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.convert.compare import compare
from ultrafuser_mega.convert.export import export
from ultrafuser_mega.convert.importer import import_specialists, plan_config, plan_folders
from ultrafuser_mega.convert.shards import LEDGER, check_hashes
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.release import modeling_ultrafuser

Spoil = Callable[[Path], object]
WHAT = "specialist:a"
SHARD_BYTES = 60_000  # about eight shards


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a ``checkpoint`` of one specialist; read only."""
    root = tmp_path_factory.mktemp("again")
    import_specialists(plan_folders({"a": write_family(root / "source", "qwen3")}, None), root / "checkpoint")
    return root


@pytest.fixture
def checkpoint(intact: Path, tmp_path: Path) -> Path:
    """The same to spoil."""
    return Path(shutil.copytree(intact / "checkpoint", tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def fused(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three specialists, called otherwise than their folders; read only."""
    root = tmp_path_factory.mktemp("fused")
    tree = config_tree(trio, root / "runs", ONE)
    shutil.copytree(trio / "text", root / "plain-talker")
    tree["specialists"]["text"]["path"] = str(root / "plain-talker")
    import_specialists(plan_config(FuserConfig.model_validate(tree), None), root / "checkpoint")
    return root / "checkpoint"


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("shard_bytes", [10**9, SHARD_BYTES], ids=["one file", "shards"])
def test_an_exported_specialist_can_be_imported_and_exported_again(
    intact: Path, tmp_path: Path, shard_bytes: int
) -> None:
    """Its ledger speaks of the first export's files, and must not come back over the second's."""
    export(intact / "checkpoint", tmp_path / "first", WHAT, verify=False, shard_bytes=shard_bytes)
    import_specialists(plan_folders({"a": tmp_path / "first"}, None), tmp_path / "checkpoint")
    for name in ("second", "third"):  # cut otherwise than the first
        export(tmp_path / "checkpoint", tmp_path / name, WHAT, shard_bytes=2 * SHARD_BYTES)
        check_hashes(tmp_path / name)
    assert bytes_of(tmp_path / "second") == bytes_of(tmp_path / "third")
    assert compare(str(tmp_path / "first"), str(tmp_path / "third"), "a b c", 0.0).equal

    export(tmp_path / "checkpoint", tmp_path / "alike", WHAT, verify=False, shard_bytes=shard_bytes)
    first, alike = bytes_of(tmp_path / "first"), bytes_of(tmp_path / "alike")
    ledgers = [json.loads(files.pop(LEDGER)) for files in (first, alike)]
    assert first == alike
    assert ledgers[0]["shards"] == ledgers[1]["shards"]


def interrupt(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> None:
    """Let a fused export run into a full disk behind its weights, where most of its other files are written."""

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("ultrafuser_mega.release.assemble.write_card", full)
        message = refusal(call)
    assert ".out.partial: cannot be read or written (No space left on device; " in message


def test_going_on_with_another_what_leaves_nothing_of_the_first(
    fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, unfinished = tmp_path / "out", tmp_path / ".out.partial"
    interrupt(monkeypatch, lambda: export(fused, out, "fused", verify=False))
    assert (unfinished / Path(modeling_ultrafuser.__file__).name).is_file()
    assert json.loads((unfinished / LEDGER).read_text())["shards"]
    notices = export(fused, out, "specialist:text", resume=True, verify=False)
    assert notices == [f"{unfinished}: was left by the export of something else; thrown away and begun anew"]
    export(fused, tmp_path / "alone", "specialist:text", verify=False)
    assert bytes_of(out) == bytes_of(tmp_path / "alone")


def test_the_folder_says_whose_it_is_before_its_first_tensor(
    intact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object) -> list[str]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ultrafuser_mega.convert.export.write_shards", stop)
        export(intact / "checkpoint", tmp_path / "out", WHAT, verify=False)
    noted = json.loads((tmp_path / ".out.partial" / LEDGER).read_text())
    assert noted["shards"] == {}
    assert export(intact / "checkpoint", tmp_path / "out", WHAT, resume=True, verify=False) == []
    assert json.loads((tmp_path / "out" / LEDGER).read_text())["identity"] == noted["identity"]


def test_a_folder_that_is_no_export_is_not_thrown_away(intact: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "diary.txt").write_text("mine")
    message = refusal(lambda: export(intact / "checkpoint", tmp_path / "out", WHAT, resume=True, verify=False))
    assert message == f"{tmp_path / '.out.partial'}: is no interrupted export (no export.json); remove it"
    assert (tmp_path / ".out.partial" / "diary.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("place", "named"),
    [("file/out", "Not a directory"), ("file/deep/out", "Not a directory"), (f"{'n' * 300}", "File name too long")],
)
def test_an_impossible_place_is_refused_in_one_line(intact: Path, tmp_path: Path, place: str, named: str) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(lambda: export(intact / "checkpoint", tmp_path / place, WHAT, verify=False))
    assert message.startswith(str(tmp_path)) and message.endswith(f": cannot be read or written ({named})")


def test_a_place_without_permission_is_refused_in_one_line(
    intact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions do not bind root, who runs tests in containers; the system's answer does not depend on that."""

    def denied(path: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", denied)
    message = refusal(lambda: export(intact / "checkpoint", tmp_path / "out", WHAT, verify=False))
    assert message == f"{tmp_path / '.out.partial'}: cannot be read or written (Permission denied)"


@pytest.mark.parametrize("out", [".", "/"])
def test_a_place_without_a_name_exists_already(intact: Path, out: str) -> None:
    assert "exists already" in refusal(lambda: export(intact / "checkpoint", Path(out), WHAT))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (Path.unlink, r"distcp: missing; it holds (specialists|heads)\."),
        (
            lambda path: path.write_bytes(path.read_bytes()[:9999]),
            r"distcp: damaged where it holds (specialists|heads)",
        ),
    ],
    ids=["missing", "cut"],
)
def test_damaged_chunks_are_named_by_a_comparison_too(checkpoint: Path, spoil: Spoil, named: str) -> None:
    for path in checkpoint.glob("*.distcp"):
        spoil(path)
    address = f"{checkpoint}@{WHAT}"
    with pytest.raises(InputError, match=named) as caught:
        compare(address, address, "a b", 0.0)
    assert "\n" not in str(caught.value)


def test_the_card_names_the_folders_that_the_specialists_came_from(fused: Path, tmp_path: Path) -> None:
    export(fused, tmp_path / "release", "fused", verify=False)
    card = (tmp_path / "release" / "README.md").read_text()
    rows = {line.split(" | ")[0]: line.split(" | ")[1] for line in card.splitlines() if line.count("|") == 5}
    assert rows["| text"] == "plain-talker" and rows["| code"] == "code"
    assert str(tmp_path.parent) not in card
