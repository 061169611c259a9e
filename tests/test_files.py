from __future__ import annotations

import os
from pathlib import Path

import pytest

from placement.errors import InputError
from placement.files import search_folders, write_atomically


def test_writes_new_file(tmp_path: Path) -> None:
    """Missing folders are made, and text is written as UTF-8."""
    path = tmp_path / "a" / "b.toml"
    write_atomically(path, "é")
    assert path.read_bytes() == "é".encode()


def test_old_file_becomes_backup(tmp_path: Path) -> None:
    """What was there before stays as NAME.bak."""
    path = tmp_path / "b.toml"
    write_atomically(path, "old")
    write_atomically(path, "new")
    assert (path.read_text(), (tmp_path / "b.toml.bak").read_text()) == ("new", "old")


def test_new_file_has_no_backup(tmp_path: Path) -> None:
    """A first write leaves the file alone in its folder."""
    write_atomically(tmp_path / "b.toml", "x")
    assert os.listdir(tmp_path) == ["b.toml"]


def test_failed_write_leaves_all_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the last step fails, the old file is whole and no temporary one remains."""
    path = tmp_path / "b.toml"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match=r"b\.toml: cannot be written: No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


def test_folder_below_a_file(tmp_path: Path) -> None:
    """A path below a file is an input error."""
    (tmp_path / "f").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_atomically(tmp_path / "f" / "g.toml", "x")


def test_file_can_be_read_by_others(tmp_path: Path) -> None:
    """The file gets ordinary permissions, not those of a temporary one."""
    write_atomically(tmp_path / "b.toml", "x")
    assert (tmp_path / "b.toml").stat().st_mode & 0o777 == 0o644


def test_nearest_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """./models is searched first, then the user's, then what is shipped."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "models").mkdir()
    (tmp_path / "config" / "place" / "models").mkdir(parents=True)
    found = [folder.resolve() for folder in search_folders("models")]
    assert found[:2] == [tmp_path / "models", tmp_path / "config" / "place" / "models"]
    assert (found[2] / "glm-flash.toml").is_file()


def test_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory that was deleted is not an error: what is shipped is still found."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert search_folders("models") != []
