"""Files and folders that appear whole or not at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rollout.files import atomic_write, create_only, is_unfinished, new_folder, replacing


def test_a_write_replaces_the_whole_file_and_makes_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    atomic_write(path, "long old text")
    atomic_write(path, b"new", durable=True)
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    atomic_write(path, "old")
    with pytest.raises(ValueError, match="half"), replacing(path) as hidden:
        hidden.write_text("ne")
        raise ValueError("half written")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["b.json"]


def test_what_a_killed_writer_leaves_is_told_by_its_name(tmp_path: Path) -> None:
    with replacing(tmp_path / "b.json") as hidden:
        hidden.write_text("half")
        assert is_unfinished(hidden.name)
    assert not any(
        is_unfinished(name) for name in ("b.json", ".b.json", ".nfs000000000a1b2c3d00000001")
    )


def test_one_of_many_creators_wins_and_its_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "marker.json"
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda n: create_only(path, f"{n}" * 1000), range(10)))
    assert won.count(True) == 1
    assert path.read_text() == f"{won.index(True)}" * 1000
    assert not create_only(path, "another")
    assert [p.name for p in tmp_path.iterdir()] == ["marker.json"]


def test_a_create_on_a_path_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        create_only(tmp_path / "file" / "below", "x")


def test_a_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    with new_folder(tmp_path / "runs" / "model", durable=True) as hidden:
        (hidden / "deep").mkdir()
        (hidden / "deep" / "weights").write_text("w")
        assert not (tmp_path / "runs" / "model").exists()
    assert (tmp_path / "runs" / "model" / "deep" / "weights").read_text() == "w"
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["model"]


def test_a_folder_that_fails_or_comes_second_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="half"), new_folder(tmp_path / "model") as hidden:
        (hidden / "weights").write_text("ne")
        raise ValueError("half written")
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="model"), new_folder(tmp_path / "model") as hidden:
        (hidden / "weights").write_text("second")
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "weights").write_text("first")
    assert (tmp_path / "model" / "weights").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
