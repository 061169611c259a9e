"""The repository's solutions are what the solver says today."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.solutions import SHIPPED
from placement.inputs.machine_files import resolve_machine
from placement.inputs.model_files.files import resolve_model
from placement.llamacpp.emit.arguments import shell_command
from placement.predict.solution import SolutionSet
from placement.solve.request import Request
from placement.solve.solve import solve_request

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "solutions").glob("*/solution.toml"))
IDS = [path.parent.name.partition("--")[0] for path in FILES]


def kept(path: Path) -> dict[str, Any]:
    """A solution.toml as it lies there."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


@cache
def solved_again(path: Path) -> SolutionSet:
    """The same question asked once more."""
    table = kept(path)
    workload = {key: value for key, value in table["workload"].items() if key != "kv_type"}
    request = Request(
        **workload,
        kv_type=table["workload"]["kv_type"],
        program=table["program"],
        reserve_mib=table["reserve_mib"],
    )
    return solve_request(resolve_model(table["model"]), resolve_machine(table["machine"]), request)


def test_all_shipped_models_are_solved() -> None:
    """The folder holds a solution of each shipped model, and of nothing else."""
    assert sorted(kept(path)["model"] for path in FILES) == sorted(SHIPPED)


def test_all_descriptions_are_solved() -> None:
    """Every model description of the repository is one of the shipped models."""
    assert sorted(path.stem for path in (ROOT / "models").glob("*.toml")) == sorted(SHIPPED)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_same_model(path: Path) -> None:
    """The solved model is the one described today, tensor for tensor."""
    assert kept(path)["model_digest"] == resolve_model(kept(path)["model"]).digest


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_same_answer(path: Path) -> None:
    """Solving again gives the same solutions by name, argument for argument."""
    result = solved_again(path)
    assert {each["name"]: each["args"] for each in kept(path)["solutions"]} == {
        each.name: list(each.args) for each in result.solutions
    }


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_proven_and_within_the_caps(path: Path) -> None:
    """Every recommended placement is proven within 1 %, and no placement is over a cap."""
    result = solved_again(path)
    assert result.solutions[0].gap is not None
    assert result.solutions[0].gap <= 0.01
    assert all(use.headroom_mib >= 0 for each in result.solutions for use in each.devices.values())


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_command_is_complete(path: Path) -> None:
    """The kept command is llama-server with the placement's arguments and the profile's own."""
    table = kept(path)
    for each in table["solutions"]:
        command = shell_command("llama-server", f"{table['model']}.gguf", each["args"], each["extra_args"])
        assert command == each["command"]
