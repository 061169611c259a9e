"""The Pareto front against placements tried at random; the best different placements against all there are."""

from __future__ import annotations

import itertools
from random import Random

import golden_sample
import pytest
from hypothesis import given
from hypothesis import strategies as st
from solving_support import (
    configuration,
    dense_model,
    expert_model,
    one_card,
    problem,
    random_answer,
    table_of,
    two_cards,
)
from test_cpsat import answers

from placement.inputs.machine import Machine
from placement.inputs.model import Model
from placement.llamacpp.compute import plan_compute
from placement.predict.check import device_use
from placement.predict.cost import evaluate, graph_counts
from placement.predict.solution import Solution
from placement.solve.cpsat.frame import is_alike, is_valid
from placement.solve.pareto import (
    FASTER,
    PARETO_GAP,
    RESERVES,
    Merit,
    best_different,
    is_dominated,
    spread,
    walk,
)
from placement.solve.request import Request
from placement.solve.search.configurations import SearchSpace
from placement.solve.search.search import Search
from placement.solve.search.subproblems import Candidate
from placement.solve.solve import MAX_SHOWN, make_problem, solve_request

EXPERTS = expert_model(8)
CASES = {
    "experts": (EXPERTS, two_cards(500, 300)),
    "experts, roomy": (EXPERTS, two_cards(1500, 900)),
    "dense": (dense_model(10), two_cards(160, 120)),
}


def merit(each: Solution) -> Merit:
    """Decode, prompt and headroom of a solution."""
    return each.speed.decode_tps, each.speed.prompt_tps or 0.0, each.headroom_mib


def shown(name: str, **asked: object) -> tuple[Solution, ...]:
    """What a case shows."""
    request = Request(prompt_tokens=1000, generate_tokens=200, **asked)  # type: ignore[arg-type]
    return solve_request(*CASES[name], request).solutions


@pytest.mark.parametrize("name", CASES)
def test_nothing_shown_is_beaten_by_another(name: str) -> None:
    """No point of the Pareto front is as good as another nowhere and worse somewhere; at most twelve are shown."""
    result = shown(name)
    assert len(result) <= MAX_SHOWN
    assert [each.name for each in result[:2]] == ["aggressive", "moderate"]
    for one, other in itertools.permutations(result[2:], 2):
        assert not is_dominated(merit(one), [merit(other)])
    assert min(each.speed.turn_s for each in result) >= result[0].speed.turn_s * 0.999


def fitting(model: Model, machine: Machine, n: int) -> list[tuple[Merit, tuple[float, ...]]]:
    """Placements tried at random that fit: their merits, and the share of each card's total that is free."""
    asked, random, results = problem(model, machine), Random(5), []
    for names in (("CUDA0", "CUDA1"), ("CUDA0",), ("CUDA1", "CUDA0")):
        for ubatch in (256, 512, 1024):
            table = table_of(asked, configuration(asked, *names, load_mode="none", ubatch_tokens=ubatch))
            for _ in range(n):
                assignment = table.assignment(random_answer(table.frame, random))
                plan = plan_compute(model, machine, assignment, asked.program)
                use = device_use(asked, assignment, plan)
                if any(each.headroom_mib < 0 for each in use.values()):
                    continue
                speed = evaluate(asked, assignment, graph_counts(plan))
                cards = [use[name] for name in names]
                free = tuple(each.headroom_mib / each.total_mib for each in cards)
                head = min(each.headroom_mib for each in cards)
                results.append(((speed.decode_tps, speed.prompt_tps or 0.0, head), free))
    return results


@pytest.mark.parametrize("name", CASES)
def test_every_placement_has_a_point_that_is_nearly_as_good(name: str) -> None:
    """Whatever fits under a reserve, some point of the walk decodes as fast, with prompts at least 0.8 as fast."""
    model, machine = CASES[name]
    search = Search(problem(model, machine), time_limit_s=60.0)
    points = list(walk(search, SearchSpace(), lambda _text: None))
    merits = []
    for result in points:
        use = device_use(search.problem, result.assignment, result.plan)
        cards = [use[each] for each in result.assignment.devices]
        free = min((each.headroom_mib / each.total_mib for each in cards), default=1.0)
        merits.append((result.speed.decode_tps, result.speed.prompt_tps or 0.0, free))
    tried = fitting(model, machine, 12)
    assert len(tried) >= 5
    for (decode, prompt, _), free in tried:
        for reserve in RESERVES:
            if min(free) >= reserve:
                assert any(
                    d >= decode * (1 - PARETO_GAP - 0.005)
                    and p >= prompt * FASTER * 0.995
                    and f >= reserve - 0.001
                    for d, p, f in merits
                )


def test_best_different_are_the_best() -> None:
    """On one card and four layers, the five best different placements are those of all that fit, by brute force."""
    asked = problem(expert_model(4), one_card(330))
    space = SearchSpace(ubatches=(512,), load_modes=("none",), orders=(("CUDA0",),))
    search = Search(asked, time_limit_s=60.0)
    first = search.best(space, search.lower_bounds(space), gap=0.0)
    assert first is not None
    result = best_different(search, space, first, 5, lambda _text: None)
    assert [each.objective for each in result] == pytest.approx(brute_force(search, space, 5), rel=0.003)
    frame = search.subproblem(search.lower_bounds(space)[0].configuration, space)
    assert frame is not None
    for one, other in itertools.combinations(result, 2):
        assert not is_alike(frame.table.frame, one.answer, other.answer)


def brute_force(search: Search, space: SearchSpace, n: int) -> list[int]:
    """Objectives of the best placements that differ, each taken greedily, under the buffers that the search knows."""
    subproblem = next(
        subproblem
        for lower_bound in search.lower_bounds(space)
        if (subproblem := search.subproblem(lower_bound.configuration, space))
    )
    frame, rated = subproblem.table.frame, []
    for answer in answers(frame):
        if not is_valid(frame, answer):
            continue
        assignment = subproblem.table.assignment(answer)
        use = device_use(search.problem, assignment, search.plan(assignment))
        if all(each.headroom_mib >= 0 for each in use.values()):
            rated.append((subproblem.relaxation.objective(answer), answer))
    kept: list[tuple[int, object]] = []
    for objective, answer in sorted(rated, key=lambda each: each[0]):
        if not any(is_alike(frame, answer, other) for _, other in kept):  # type: ignore[arg-type]
            kept.append((objective, answer))
    return [objective for objective, _ in kept[:n]]


def test_top_adds_the_best() -> None:
    """Asked for the four best, at least four placements are shown, none twice, and the named ones stay."""
    result = shown("experts", n_best=4, ubatch_tokens=512)
    turns = sorted(each.speed.turn_s for each in result)
    assert len({each.args for each in result}) == len(result) >= 4
    assert [each.name for each in result[:2]] == ["aggressive", "moderate"]
    assert turns[3] <= turns[0] * 1.05


@given(
    merits=st.lists(st.tuples(*[st.floats(1, 1000)] * 3), max_size=30),
    n_kept=st.integers(0, 2),
    n=st.integers(2, 12),
)
def test_spread_keeps_the_first(merits: list[Merit], n_kept: int, n: int) -> None:
    """So many points are shown as there may be, each once, the first among them."""
    picked = spread(merits, n_kept, n)
    assert len(picked) == len(set(picked)) == min(n, len(merits))
    assert set(range(min(n_kept, len(merits)))) <= set(picked)


def test_spread_prefers_what_is_far() -> None:
    """Of two more points the one that is unlike those shown is taken first."""
    near, far = (100.0, 100.0, 11.0), (10.0, 500.0, 900.0)
    assert spread([(100.0, 100.0, 10.0), near, far], 1, 2) == [0, 2]


def test_walk_ends_where_nothing_is_faster() -> None:
    """Each step of the walk has faster prompts than the last, and slower or equal decode."""
    search = Search(problem(EXPERTS, one_card(500)), time_limit_s=60.0)
    steps: list[Candidate] = list(walk(search, SearchSpace(), lambda _text: None))
    for one, other in itertools.pairwise(steps):
        if other.speed.prompt_s <= one.speed.prompt_s:
            assert other.speed.decode_s >= one.speed.decode_s * (1 - 2 * PARETO_GAP)


@pytest.mark.parametrize("name", ["llama-moe", "falcon-dense"])
def test_walk_ends(name: str) -> None:
    """Where a frame counts most of a short prompt too short, because splits are all that it takes, the walk ends."""
    request = Request(ctx_tokens=512, prompt_tokens=20, generate_tokens=50, depth_tokens=0)
    asked, _ = make_problem(golden_sample.model(name), one_card(6, host_mib=9000), request)
    steps = walk(Search(asked, time_limit_s=60.0), SearchSpace(), lambda _text: None)
    assert len(list(itertools.islice(steps, 60))) < 60
