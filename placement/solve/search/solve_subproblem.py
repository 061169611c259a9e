"""One subproblem solved: the segments' answer, CP-SAT where that leaves a gap, and the answer's own compute buffers.

Compute buffers are estimates until an answer is known; then that placement is planned exactly, and where it does not
fit, or leaves much unused, its frame is built again with what was found.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from placement.predict.cost import evaluate, graph_counts
from placement.solve.cpsat.frame import CPU_POSITION, Answer, is_alike, taken_extras, used_kib
from placement.solve.cpsat.placing import Placing
from placement.solve.cpsat.program import ProgramResult
from placement.solve.cpsat.relaxation import Relaxation
from placement.solve.frames.buffers import compute_table
from placement.solve.frames.pieces import N_EARLY_LAYERS
from placement.solve.frames.tables import ComputeTable, Table, host_pattern
from placement.solve.search.configurations import SearchSpace
from placement.solve.search.subproblems import Candidate, Subproblem, Subproblems
from placement.units import KIB, MIB

GAP = 0.002  # of a turn: what is proven unless less is asked
MAX_CORRECTIONS = 9
FEW_CORRECTIONS = 4  # after that many, or
FEW_PATTERNS = 4  # where more than that many are new at once, what lacks is charged to every placement
WORK_LIMIT = 10.0  # CP-SAT's deterministic time for one proof
OTHER_WEIGHTS = ((1, 1), (1, 30), (30, 1))
WASTE_BYTES = 24 * MIB  # buffers assumed too large by more than this are corrected


@dataclass(frozen=True)
class SubproblemSolver:
    """How subproblems are solved: in a search space, within a gap, unlike the placements taken, until a deadline."""

    subproblems: Subproblems
    space: SearchSpace
    gap: float
    taken: Sequence[Candidate]
    seed: int
    deadline_s: float  # by time.monotonic
    work_limit: float  # CP-SAT's deterministic time for one proof

    def solve_subproblem(self, subproblem: Subproblem, limit: float) -> tuple[Candidate | None, float, bool]:
        """Solve one subproblem below a limit: a placement that fits or None, its bound, whether it is proven.

        What is shown of buffers that one placement lacked holds for no other: the bound then stays as it was.
        """
        floor = float("inf")
        best: tuple[Candidate | None, float, bool] = None, float("inf"), True
        is_tightened = False
        again: Subproblem | None = subproblem
        for n_before in range(MAX_CORRECTIONS):
            if again is None:
                return best
            subproblem = again
            answer, bound, is_proven = self._prove(subproblem, limit, _excluded(subproblem, self.taken))
            floor = bound = min(bound, floor) if subproblem.compute.is_padded else bound
            if answer is None:
                return best if best[0] is not None else (None, bound, is_proven)
            assignment = subproblem.table.assignment(answer)
            plan = self.subproblems.plan(assignment)
            real = compute_table(subproblem.configuration, plan)
            if not self._fits(subproblem, answer, real):
                again = self._correct(subproblem, answer, real, n_before)
                again = replace(again, kinds_bound=subproblem.kinds_bound) if again is not None else None
                continue
            speed = evaluate(self.subproblems.problem, assignment, graph_counts(plan))
            objective = subproblem.relaxation.objective(answer)
            if best[0] is None or objective < best[0].objective:
                best = (
                    Candidate(assignment, answer, plan, speed, objective, bound, is_proven),
                    bound,
                    is_proven,
                )
            if is_tightened or not self._wastes(subproblem, answer, real):
                return best
            is_tightened = True
            n_bytes = tuple(map(min, subproblem.compute.n_bytes, real.n_bytes))
            self.subproblems.corrected[subproblem.configuration] = replace(
                subproblem.compute, n_bytes=n_bytes
            )
            again = self.subproblems.subproblem(subproblem.configuration, self.space)
        return best if best[0] is not None else (None, subproblem.bound, False)

    def _wastes(self, subproblem: Subproblem, answer: Answer, real: ComputeTable) -> bool:
        """Whether a card that something was moved off has much more room than its buffers were thought to leave."""
        layers = subproblem.table.frame.layers
        lacking = {
            home
            for table, home, pick in zip(layers, answer.homes, answer.picks, strict=True)
            if home == CPU_POSITION or pick
        }
        if not lacking:
            return False
        over = [a - r for a, r in zip(subproblem.compute.n_bytes, real.n_bytes, strict=True)]
        return any(over[p] > WASTE_BYTES for p in range(1, len(over)) if p in lacking or 0 in answer.homes)

    def _fits(self, subproblem: Subproblem, answer: Answer, real: ComputeTable) -> bool:
        """Whether the placement keeps within the caps with its own compute buffers."""
        frame = subproblem.table.frame
        spare = [(cap - used) * KIB for cap, used in zip(frame.cap_kib, used_kib(frame, answer), strict=True)]
        assumed = self._assumed(subproblem, answer)
        return all(left + a >= r for left, a, r in zip(spare, assumed, real.n_bytes, strict=True))

    def _assumed(self, subproblem: Subproblem, answer: Answer) -> list[int]:
        """The compute buffers that the frame counted for this answer."""
        assumed = list(subproblem.compute.n_bytes)
        for extra in taken_extras(subproblem.table.frame, answer):
            assumed = [a + kib * KIB for a, kib in zip(assumed, extra.kib, strict=True)]
        return assumed

    def _correct(
        self, subproblem: Subproblem, answer: Answer, real: ComputeTable, n_before: int
    ) -> Subproblem | None:
        """The subproblem again with what its buffers lacked: charged to early or partly moved layers where any are new.

        Buffers also depend a little on how many layers a card has, so that placements may take turns at lacking
        some: what is charged to every placement grows by ever more to spare.
        """
        lacking = tuple(
            max(0, r - a) for r, a in zip(real.n_bytes, self._assumed(subproblem, answer), strict=True)
        )
        frame = subproblem.table.frame
        patterns = {
            pattern
            for i, (home, pick) in enumerate(zip(answer.homes, answer.picks, strict=True))
            if (groups := frame.layers[i].choices[home][pick].groups)
            and (pattern := host_pattern(home, i < N_EARLY_LAYERS, groups)) is not None
        }
        known = dict(subproblem.compute.extras)
        new = patterns - known.keys()
        if new and len(new) <= FEW_PATTERNS and n_before < FEW_CORRECTIONS:
            early = {pattern for pattern in new if pattern[1]}
            compute = replace(
                subproblem.compute,
                extras=(*subproblem.compute.extras, *((each, lacking) for each in sorted(early or new))),
            )
        else:
            spare = WASTE_BYTES << n_before >> 1 if subproblem.compute.is_padded else 0
            merged = tuple(
                a + b + spare * (b > 0) for a, b in zip(subproblem.compute.n_bytes, lacking, strict=True)
            )
            compute = replace(subproblem.compute, n_bytes=merged, is_padded=True)
        self.subproblems.corrected[subproblem.configuration] = compute
        return self.subproblems.subproblem(subproblem.configuration, self.space)

    def _prove(
        self, subproblem: Subproblem, limit: float, excluded: Sequence[Answer]
    ) -> tuple[Answer | None, float, bool]:
        """An answer below the limit within the gap, or none; the bound; whether that is proven.

        The segments give an answer and a bound. Where these are further apart than the gap, CP-SAT is asked for
        anything better than the answer, in the homes that the bound leaves open: it proves quickly that nothing
        is below a cutoff.
        """
        relaxation, bound = subproblem.relaxation, subproblem.bound
        if bound >= limit:
            return None, bound, True
        answer, low = _first_answer(
            subproblem, self.gap / 4 if self.gap <= GAP else self.gap / 2, limit, excluded
        )
        bound = max(bound, low)
        value = float("inf") if answer is None else relaxation.objective(answer)
        while bound < (target := limit if limit < value else value * (1 - self.gap)):
            left_s = self.deadline_s - time.monotonic()
            homes = relaxation.homes(subproblem.relaxed, target)
            if not all(homes):
                bound = target
                break
            if left_s <= 0:
                return (answer if value < limit else None), bound, False
            result, match = self._ask(subproblem, homes, target, answer, excluded, left_s)
            if match is not None:
                answer, value = match, relaxation.objective(match)
            if result.status == "INFEASIBLE":
                bound = max(bound, target)
            elif result.status == "OPTIMAL":
                bound = max(bound, min(result.bound or bound, target))
                break
            else:
                return (
                    (answer if value < limit else None),
                    max(bound, min(result.bound or bound, target)),
                    False,
                )
        return (answer if value < limit else None), bound, True

    def _ask(
        self,
        subproblem: Subproblem,
        homes: list[set[int]],
        target: float,
        answer: Answer | None,
        excluded: Sequence[Answer],
        left_s: float,
    ) -> tuple[ProgramResult, Answer | None]:
        """CP-SAT's result below a target, and its answer."""
        placing = Placing(
            subproblem.table.frame, *subproblem.relaxation.weights, homes=homes, has_symmetry=not excluded
        )
        for each in excluded:
            placing.exclude(each)
        if target < float("inf"):
            placing.cut_off(int(target))
        if answer is not None:
            placing.hint(answer)
        result = placing.program.solve(left_s, self.gap / 2, self.seed, work_limit=self.work_limit)
        return result, placing.answer(result.values) if result.values else None


def _first_answer(
    subproblem: Subproblem, gap: float, limit: float, excluded: Sequence[Answer]
) -> tuple[Answer | None, float]:
    """What the segments find, and their bound.

    Where decode or prompt time is limited, answers are also looked for under weights that favour either.
    """
    frame, relaxation = subproblem.table.frame, subproblem.relaxation
    answer, low = relaxation.answer_and_bound(gap, limit)
    results = [answer]
    if answer is None and (frame.max_decode_us is not None or frame.max_prompt_us is not None):
        results += [Relaxation(frame, *weights).answer_and_bound(gap)[0] for weights in OTHER_WEIGHTS]
    left = [
        each
        for each in results
        if each is not None
        and relaxation.objective(each) < limit
        and not any(is_alike(frame, each, other) for other in excluded)
    ]
    return min(left, key=relaxation.objective, default=None), low


def _excluded(subproblem: Subproblem, taken: Sequence[Candidate]) -> list[Answer]:
    """The taken placements as answers of this subproblem's frame, where they are on its devices."""
    return [
        Answer(each.answer.homes, tuple(_picks(subproblem.table, each)))
        for each in taken
        if each.assignment.devices == subproblem.configuration.devices
    ]


def _picks(table: Table, result: Candidate) -> Iterator[int]:
    """The choices that place a candidate's groups where they are; the first where the frame has none."""
    moved = dict(result.assignment.moved)
    number = {name: p for p, name in enumerate(table.frame.positions)}
    for layer, names, home in zip(table.frame.layers, table.group_names, result.answer.homes, strict=True):
        groups = tuple(number[moved[group[0]]] if group[0] in moved else home for group in names)
        row = [choice.groups for choice in layer.choices[home]]
        yield row.index(groups) if groups in row else 0
