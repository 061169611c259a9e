"""A timing of a placement → what each coefficient costs in it, as terms that sum to `cost.evaluate`.

A row's terms are those of `terms.TERMS` at the placement's places, with the amounts of its loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from placement.inputs.machine import Machine
from placement.inputs.problem import Assignment, Problem
from placement.predict.cost import GraphCounts, pipelined_s, placement_loads
from placement.predict.loads import Work
from placement.predict.rates import places
from placement.predict.terms import DECODE, GRAPH, OVERLAP, PROMPT, Phase, Powers, coefficient, products


@dataclass(frozen=True, slots=True)
class RowTerm:
    """Seconds = amount · Π coefficient^power, spent in one stage (a device, "CPU", or GRAPH)."""

    amount: float
    powers: Powers
    stage: str = GRAPH


@dataclass(frozen=True)
class TimingRow:
    """One measured time and its terms. `run` is what is left out together; `noise` is a share.

    `measured_s` None: a placement that was not run. Prompts of `n_copies` > 1 overlap over `n_ubatches`.
    `doubt`: why the run itself says that it was disturbed; empty if it does not.
    """

    run: str
    kind: Phase
    terms: tuple[RowTerm, ...]
    measured_s: float | None = None
    noise: float = 0.0
    n_ubatches: int = 1
    n_copies: int = 1
    label: str = ""
    doubt: str = ""


def decode_row(
    problem: Problem,
    assignment: Assignment,
    counts: GraphCounts,
    run: str = "",
    measured_s: float | None = None,
    noise: float = 0.0,
    label: str = "",
    doubt: str = "",
) -> TimingRow:
    """A token's time at the problem's depth."""
    work = Work(problem, assignment.settings)
    terms = tuple(_terms(DECODE, work, assignment, counts))
    return TimingRow(run, DECODE, terms, measured_s, noise, label=label, doubt=doubt)


def prompt_row(
    problem: Problem,
    assignment: Assignment,
    counts: GraphCounts,
    run: str = "",
    measured_s: float | None = None,
    noise: float = 0.0,
    label: str = "",
    doubt: str = "",
) -> TimingRow:
    """The time of the problem's whole prompt."""
    work = Work(problem, assignment.settings)
    terms = tuple(_terms(PROMPT, work, assignment, counts))
    n_ubatches = len(work.ubatches)
    return TimingRow(run, PROMPT, terms, measured_s, noise, n_ubatches, counts.n_copies, label, doubt)


def _terms(phase: Phase, work: Work, assignment: Assignment, counts: GraphCounts) -> Iterator[RowTerm]:
    """The phase's terms of a placement that are not nothing; only a prompt's places are stages."""
    machine, settings = work.problem.machine, assignment.settings
    at = places(machine, assignment.devices, settings, work.is_offloaded)[phase]
    for where, load in placement_loads(work, assignment, counts)[phase].items():
        for product in products(phase, at[where]):
            amount = getattr(load, product.quantity) / product.per_second
            if amount:
                yield RowTerm(amount, product.powers, where if phase == PROMPT else GRAPH)


def predict_s(row: TimingRow, machine: Machine) -> float:
    """The seconds of a row on a machine; what `cost.evaluate` says of the same placement."""
    stages: dict[str, float] = {}
    for term in row.terms:
        seconds = term.amount
        for name, power in term.powers:
            seconds *= coefficient(machine, name) ** power
        stages[term.stage] = stages.get(term.stage, 0.0) + seconds
    graph = stages.pop(GRAPH, 0.0)
    return graph + pipelined_s(stages.values(), row.n_ubatches, row.n_copies, coefficient(machine, OVERLAP))
