"""A second run of the same name never mixes with what the first one left."""

from __future__ import annotations

from pathlib import Path

from ultrafuser_mega.training.run_folder import set_aside


def test_earlier_run_is_moved_to_the_next_free_number_without_its_store(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    for number in (1, 2):
        (run / "checkpoints" / "stage2-step0000150").mkdir(parents=True)
        (run / "store").mkdir(exist_ok=True)
        (run / "metrics.jsonl").write_text(f"run {number}")
        assert set_aside(run) == tmp_path / f"demo.{number}"
    assert [path.name for path in run.iterdir()] == ["store"]
    assert (tmp_path / "demo.2" / "metrics.jsonl").read_text() == "run 2"
    assert (tmp_path / "demo.1" / "checkpoints" / "stage2-step0000150").is_dir()


def test_nothing_happens_without_an_earlier_run(tmp_path: Path) -> None:
    assert set_aside(tmp_path / "new") is None
    assert list(tmp_path.iterdir()) == []


def test_what_lies_behind_a_link_is_kept_beside_it_there(tmp_path: Path) -> None:
    """Files can be moved on one disk only."""
    (tmp_path / "scratch" / "demo").mkdir(parents=True)
    (tmp_path / "scratch" / "demo" / "metrics.jsonl").write_text("run 1")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(tmp_path / "scratch" / "demo")
    assert set_aside(tmp_path / "runs" / "demo") == tmp_path / "scratch" / "demo.1"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo"]
    assert (tmp_path / "scratch" / "demo.1" / "metrics.jsonl").read_text() == "run 1"
