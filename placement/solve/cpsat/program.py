"""A linear program over booleans, written as CP-SAT's protocol text and solved by OR-Tools.

`ortools.sat.python.cp_model` imports pandas, which costs more than most of our solves; the text form of
CpModelProto and the solver beneath it are the same engine without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_INT64_MIN = -(2**63)
_INT64_MAX = 2**63 - 1

LinearTerms = list[tuple[int, int]]  # (variable, coefficient)


@dataclass(frozen=True, slots=True)
class ProgramResult:
    """`status` is OPTIMAL, FEASIBLE, INFEASIBLE or UNKNOWN; `values` per variable, empty without a solution."""

    status: str
    values: tuple[int, ...]
    objective: int | None
    bound: float | None
    wall_s: float


class CpsatProgram:
    """Collects variables and constraints; `solve` may be called again after constraints were added."""

    def __init__(self) -> None:
        self._variables: list[str] = []
        self._constraints: list[str] = []
        self._objective: dict[int, int] = {}
        self._offset = 0
        self._hint: dict[int, int] = {}

    @property
    def n_variables(self) -> int:
        """Variables so far."""
        return len(self._variables)

    @property
    def n_constraints(self) -> int:
        """Constraints so far."""
        return len(self._constraints)

    def boolean(self) -> int:
        """Add a 0/1 variable; returns its index."""
        self._variables.append("variables{domain:[0,1]}")
        return len(self._variables) - 1

    def integer(self, least: int, most: int) -> int:
        """Add an integer variable; returns its index."""
        self._variables.append(f"variables{{domain:[{least},{most}]}}")
        return len(self._variables) - 1

    def at_most(self, terms: LinearTerms, most: int) -> None:
        """Require Σ coefficient·variable ≤ most."""
        self._linear(terms, _INT64_MIN, most)

    def at_least(self, terms: LinearTerms, least: int) -> None:
        """Require Σ coefficient·variable ≥ least."""
        self._linear(terms, least, _INT64_MAX)

    def _linear(self, terms: LinearTerms, least: int, most: int) -> None:
        merged: dict[int, int] = {}
        for variable, coefficient in terms:
            merged[variable] = merged.get(variable, 0) + coefficient
        merged = {variable: coefficient for variable, coefficient in merged.items() if coefficient}
        names = ",".join(map(str, merged))
        factors = ",".join(map(str, merged.values()))
        self._constraints.append(
            f"constraints{{linear{{vars:[{names}] coeffs:[{factors}] domain:[{least},{most}]}}}}"
        )

    def minimise(self, terms: LinearTerms, offset: int = 0) -> None:
        """Set the objective Σ coefficient·variable + offset."""
        self._objective, self._offset = {}, offset
        for variable, coefficient in terms:
            self._objective[variable] = self._objective.get(variable, 0) + coefficient

    def hint(self, values: dict[int, int]) -> None:
        """Suggest values to start from."""
        self._hint = values

    def text(self) -> str:
        """The program as CpModelProto text."""
        objective = {variable: c for variable, c in self._objective.items() if c}
        parts = [*self._variables, *self._constraints]
        parts.append(
            f"objective{{vars:[{','.join(map(str, objective))}] coeffs:[{','.join(map(str, objective.values()))}]"
            f" offset:{self._offset}}}"
        )
        if self._hint:
            parts.append(
                f"solution_hint{{vars:[{','.join(map(str, self._hint))}]"
                f" values:[{','.join(map(str, self._hint.values()))}]}}"
            )
        return "\n".join(parts)

    def solve(
        self, time_limit_s: float, relative_gap: float, seed: int, n_workers: int = 1, work_limit: float = 1e9
    ) -> ProgramResult:
        """Run CP-SAT; with one worker the same program, seed and version give the same answer.

        `work_limit` is CP-SAT's deterministic time, which no load of the machine changes; a second of wall time is
        about a third of a unit. Only the time limit may make two answers differ.
        """
        from ortools.sat.python import cp_model_helper as helper

        proto = helper.CpModelProto()
        if not proto.parse_text_format(self.text()):
            raise AssertionError("the CP-SAT program's text does not parse")
        parameters = helper.SatParameters()
        parameters.max_time_in_seconds = time_limit_s
        parameters.relative_gap_limit = relative_gap
        parameters.random_seed = seed
        parameters.num_workers = n_workers
        parameters.max_deterministic_time = work_limit
        solver: Any = helper.SolveWrapper()
        solver.set_parameters(parameters)
        return _result(solver.solve(proto))


def _result(response: Any) -> ProgramResult:
    status = response.status.name
    if status == "MODEL_INVALID":
        raise AssertionError(f"the CP-SAT program is invalid: {response.solution_info}")
    has_solution = status in ("OPTIMAL", "FEASIBLE")
    return ProgramResult(
        status=status,
        values=tuple(response.solution) if has_solution else (),
        objective=round(response.objective_value) if has_solution else None,
        bound=float(response.best_objective_bound) if status != "INFEASIBLE" else None,
        wall_s=float(response.wall_time),
    )
