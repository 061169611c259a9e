"""A solution, fresh or from a stored solution.toml, as what is written where users keep their settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from placement.errors import InputError
from placement.inputs.problem import CPU
from placement.predict.solution import label_words

RECOMMENDED = "aggressive"
_OBJECTIVES = {"decode": "decodes fastest", "prompt": "reads prompts fastest"}


@dataclass(frozen=True, slots=True)
class Memory:
    """MiB on one device, all included, and the cap on it."""

    used_mib: float
    cap_mib: float


@dataclass(frozen=True, slots=True)
class Choice:
    """The arguments selected, what is predicted of them, and why they were selected; unknown speeds are None."""

    model: str
    machine: str
    name: str
    args: tuple[str, ...]
    label: str
    memory: dict[str, Memory]
    splits_prompt: int
    splits_decode: int
    decode_tps: float | None
    prompt_tps: float | None
    turn_s: float | None
    criteria: str
    is_all_on_gpus: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run of exactly these arguments showed; None where it did not say."""

    memory_mib: dict[str, float]
    splits_prompt: int | None = None
    splits_decode: int | None = None
    decode_tps: float | None = None
    prompt_tps: float | None = None
    engine_build: str | None = None
    date: str | None = None


def choice_of(row: Mapping[str, Any], name: str | None = None, objective: str = "turn") -> Choice:
    """The solution of that name (the recommended one without) in a set's row (`solve --json`'s keys).

    Raises:
        InputError: the set has no solution of that name, or none at all.
    """
    solutions = row["solutions"]
    where = f"solutions of {row['model']}"
    if not solutions:
        raise InputError(where, row.get("message") or "nothing fits")
    names = [solution["name"] for solution in solutions]
    if name is not None and name not in names:
        raise InputError("--solution", f"there is none of that name; known: {', '.join(names)}", value=name)
    solution = solutions[names.index(name) if name is not None else 0]
    return Choice(
        model=row["model"],
        machine=row["machine"],
        name=solution["name"],
        args=tuple(solution["args"]),
        label=label_words(solution["label"], is_exact=solution.get("is_exact", True)),
        memory={device: _memory(use) for device, use in solution["devices"].items()},
        splits_prompt=solution["splits"]["prompt"],
        splits_decode=solution["splits"]["decode"],
        decode_tps=solution["speed"].get("decode_tps"),
        prompt_tps=solution["speed"].get("prompt_tps"),
        turn_s=solution["speed"].get("turn_s"),
        criteria=_criteria(row, solution, objective),
        is_all_on_gpus=CPU not in solution.get("layers", {CPU: 0}),
    )


def _memory(use: Mapping[str, float]) -> Memory:
    runtime = use.get("runtime_mib", 0.0)
    used = use["weights_mib"] + use["context_mib"] + use["compute_mib"] + runtime
    return Memory(used, use["cap_mib"] + runtime)


def _criteria(row: Mapping[str, Any], solution: Mapping[str, Any], objective: str) -> str:
    """One sentence: what the solution is best at, for which turn, and how far that is proven."""
    turn = row["workload"]
    what = (
        f"a prompt of {turn['prompt_tokens']} and an answer of {turn['generate_tokens']} tokens "
        f"at depth {turn['depth_tokens']}"
    )
    best = _OBJECTIVES.get(objective, "takes least time")
    if solution["name"] == RECOMMENDED:
        why = f"{best} for {what} within every cap"
    elif solution["name"] == "moderate":
        why = f"{best} for {what} with 5 % of every card kept free"
    else:
        why = f"chosen by name among the solutions that none beats in decode, prompt and headroom, for {what}"
    gap = solution.get("gap")
    return why if gap is None else f"{why}; at most {gap:.2%} from the proven bound"
