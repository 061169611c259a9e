from __future__ import annotations

import dataclasses
import os
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from solving_support import expert_model, one_card, problem

from placement import __version__
from placement.errors import InputError
from placement.inputs.problem import Problem
from placement.predict.solution import SolutionSet
from placement.solve.store import (
    folders_of_other_names,
    read_solutions,
    save_solutions,
    slug,
    solution_folder,
    solution_set_row,
)

PROBLEM = problem(expert_model(2), one_card(4000))
ROW: dict[str, Any] = {
    "model": "m",
    "machine": "n",
    "workload": {"ctx_tokens": 4096},
    "status": "OPTIMAL",
    "solutions": [{"name": "aggressive", "gap": None, "args": ["-ngl", "3"]}],
}


@given(st.text())
def test_slug_is_safe(text: str) -> None:
    """A slug is never empty, never hidden, has no separators, and is short enough for any file system."""
    found = slug(text)
    assert found
    assert found[0] not in ".-"
    assert not set(found) & set("/\\: \0\n")
    assert len(found) <= 80


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,78}[A-Za-z0-9]", fullmatch=True))
def test_slug_keeps_good_names(name: str) -> None:
    """A name that is safe stays as it is."""
    assert name == slug(name)


def test_folder_names_the_question() -> None:
    """The folder is MODEL--MACHINE--WORKLOAD."""
    found = solution_folder(Path("s"), PROBLEM)
    assert found == Path("s/tiny-experts--one-card--ctx4096-q8_0-np1-p1000-g200-d1024")


MIXED = dataclasses.replace(PROBLEM, settings=dataclasses.replace(PROBLEM.settings, kv_type_v="f16"))


def test_mixed_cache_has_a_folder_of_its_own() -> None:
    """K q8_0 with V f16 is another question than q8_0 for both."""
    found = solution_folder(Path("s"), MIXED)
    assert found == Path("s/tiny-experts--one-card--ctx4096-q8_0-f16-np1-p1000-g200-d1024")


@pytest.mark.parametrize(("asked", "kv_type"), [(PROBLEM, "q8_0"), (MIXED, "q8_0/f16")])
def test_row_names_both_cache_types(asked: Problem, kv_type: str) -> None:
    """The workload of a set says V's type where it is not K's."""
    found = SolutionSet("m", "digest", "n", asked.workload, "INFEASIBLE", ())
    assert solution_set_row(asked, found, {})["workload"]["kv_type"] == kv_type


def test_folders_of_other_names_differ_in_the_machine_alone(tmp_path: Path) -> None:
    """Another model, workload or variant is another question; what a file is called there is no folder."""
    mine = solution_folder(tmp_path, PROBLEM)
    other = tmp_path / mine.name.replace("one-card", "rig--2")
    strange = [
        mine.name.replace("one-card", "rig").replace(*each) for each in (("4096", "8192"), ("tiny", "my"))
    ]
    for folder in (mine, other, *(tmp_path / name for name in strange), Path(f"{other}--0a1b2c3d")):
        folder.mkdir()
    (tmp_path / mine.name.replace("one-card", "file")).touch()
    assert folders_of_other_names(mine, PROBLEM) == [other]


def test_a_variants_other_names_are_of_the_same_variant(tmp_path: Path) -> None:
    """What was asked under constraints is not mixed with what was asked without."""
    mine = solution_folder(tmp_path, PROBLEM, "0a1b2c3d")
    other = tmp_path / mine.name.replace("one-card", "rig")
    for folder in (mine, other, solution_folder(tmp_path, replace(PROBLEM, machine=one_card(4000)))):
        folder.mkdir()
    assert folders_of_other_names(mine, PROBLEM) == [other]


def test_a_folder_of_any_name_has_no_others(tmp_path: Path) -> None:
    """Records that a user keeps elsewhere are those of that folder."""
    solution_folder(tmp_path, PROBLEM).mkdir()
    assert folders_of_other_names(tmp_path / "runs", PROBLEM) == []


def save(path: Path, row: dict[str, Any] = ROW, asked: Problem = PROBLEM) -> bool:
    """Whether a row was written."""
    return save_solutions(path, asked, row)


def test_reads_what_was_written(tmp_path: Path) -> None:
    """A file has the row, without what is None, and who wrote it of which model."""
    save(tmp_path / "s.toml")
    found = read_solutions(tmp_path / "s.toml")
    assert found["solutions"] == [{"name": "aggressive", "args": ["-ngl", "3"]}]
    assert (found["place_version"], found["model_digest"]) == (__version__, PROBLEM.model.digest)


def test_same_again_is_left_alone(tmp_path: Path) -> None:
    """A second identical row says so and touches nothing: no new time stamp, no backup."""
    path = tmp_path / "s.toml"
    assert save(path)
    os.utime(path, (1, 1))
    assert not save(path)
    assert (path.stat().st_mtime, os.listdir(tmp_path)) == (1, ["s.toml"])


def test_another_row_keeps_a_backup(tmp_path: Path) -> None:
    """A different answer replaces the file and keeps the old one beside it."""
    path = tmp_path / "s.toml"
    save(path)
    assert save(path, {**ROW, "status": "FEASIBLE"})
    assert tomllib.loads((tmp_path / "s.toml.bak").read_text())["status"] == "OPTIMAL"


def test_damaged_file_is_replaced(tmp_path: Path) -> None:
    """A file that is not text is replaced, and kept as a backup."""
    path = tmp_path / "s.toml"
    path.write_bytes(b"\xff")
    assert save(path)
    assert read_solutions(path)["model"] == "m"


def test_folder_below_a_file(tmp_path: Path) -> None:
    """Writing below a file is an input error."""
    (tmp_path / "f").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save(tmp_path / "f" / "s.toml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no such file: run place solve first"),
        ("a = [", "cannot be read as TOML"),
        ("", "model: is missing"),
    ],
)
def test_unreadable(text: str | None, words: str, tmp_path: Path) -> None:
    """A missing, broken or foreign file is one line that says what to do."""
    path = tmp_path / "s.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_solutions(path)
    assert words in str(caught.value)


def test_version_is_the_projects() -> None:
    """What stands in the files is the version that pyproject.toml gives."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == __version__
