"""`solutions/MODEL--MACHINE--WORKLOAD/solution.toml`: written atomically, read back by whoever runs or applies it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from placement.errors import InputError
from placement.files import PLACE_VERSION, write_atomically
from placement.inputs.problem import Problem
from placement.llamacpp.emit.arguments import shell_command
from placement.predict.solution import SolutionSet, solution_row, workload_row

_LONGEST_SLUG = 80
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")


def slug(text: str) -> str:
    """A name as a part of one safe path component: never empty, never hidden, no separators, not long."""
    return _UNSAFE.sub("-", text).strip("-.")[:_LONGEST_SLUG] or "unnamed"


def workload_slug(problem: Problem) -> str:
    """Context, KV type (or types), slots and turn in one word."""
    settings, turn = problem.settings, problem.workload
    return (
        f"ctx{settings.ctx_tokens}-{'-'.join(settings.kv_types)}-np{settings.n_slots}"
        f"-p{turn.prompt_tokens}-g{turn.generate_tokens}-d{turn.depth_tokens}"
    )


def solution_folder(root: Path, problem: Problem, variant: str = "") -> Path:
    """Where the solutions and run records of a problem lie; `variant` tells constraints and objectives apart."""
    names = (slug(problem.model.name), slug(problem.machine.name), workload_slug(problem), variant)
    return root / "--".join(filter(None, names))


def solution_folders(root: Path, problem: Problem) -> list[Path]:
    """The folders there are of a model and workload, those of variants and under other machines' names too.

    Their run records say which machine ran.
    """
    names = f"{slug(problem.model.name)}--*--{workload_slug(problem)}"
    return sorted(each for each in (*root.glob(names), *root.glob(f"{names}--*")) if each.is_dir())


def folders_of_other_names(folder: Path, problem: Problem) -> list[Path]:
    """The folders beside a problem's own that differ in the machine's name alone: it may have been renamed."""
    model, machine = slug(problem.model.name), slug(problem.machine.name)
    rest = folder.name.removeprefix(f"{model}--{machine}--")
    if rest == folder.name:
        return []
    found = folder.parent.glob(f"{model}--*--{rest}")
    return sorted(each for each in found if each != folder and each.is_dir())


def solution_set_row(problem: Problem, found: SolutionSet, commands: dict[str, str]) -> dict[str, Any]:
    """The set with the contract's keys; the first solution is the recommended one."""
    return {
        "model": found.model,
        "machine": found.machine,
        "workload": workload_row(problem.workload, problem.settings),
        "status": found.status,
        "message": found.message,
        "warnings": list(found.warnings),
        "solutions": [solution_row(each, commands[each.name], found.extra_args) for each in found.solutions],
    }


def save_solutions(path: Path, problem: Problem, row: dict[str, Any]) -> bool:
    """Write solution.toml; returns False when the file already says exactly this (it is left alone).

    Raises:
        InputError: the folder cannot be written.
    """
    import tomli_w

    head = {
        "place_version": PLACE_VERSION,
        "model_digest": problem.model.digest,
        "program": problem.program,
        "reserve_mib": problem.reserve_mib,
    }
    text = tomli_w.dumps(_without_none({**head, **row}))
    try:
        if path.read_text(encoding="utf-8") == text:
            return False
    except (OSError, UnicodeDecodeError):
        pass  # what cannot be read is written, or refused by the writing
    write_atomically(path, text)
    return True


def read_solutions(path: Path) -> dict[str, Any]:
    """A solution.toml as written, after checking that it has what later commands need.

    Raises:
        InputError: the file is missing, is not TOML or lacks a field.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise InputError(path, "there is no such file: run place solve first") from exc
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise InputError(path, f"cannot be read as TOML: {exc}") from exc
    for field in ("model", "model_digest", "machine", "workload", "solutions"):
        if field not in table:
            raise InputError(path, "is missing: run place solve again", field=field)
    return table


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_none(each) for each in value]
    return value


def commands(problem: Problem, found: SolutionSet) -> dict[str, str]:
    """The shell line of each solution by name."""
    path = problem.model.files[0] if problem.model.files else f"{problem.model.name}.gguf"
    program = problem.program if problem.program != "llama-fit-params" else "llama-server"
    return {
        each.name: shell_command(program, path, list(each.args), list(found.extra_args))
        for each in found.solutions
    }
