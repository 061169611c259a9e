from __future__ import annotations

import pytest
from solving_support import configuration, dense_model, expert_model, problem, two_cards

from placement.inputs.problem import CPU, Assignment, Problem
from placement.llamacpp.plan import ComputePlan
from placement.predict.cost import graph_counts
from placement.solve.frames.buffers import Buffers, compute_table, typical_assignment
from placement.solve.search.search import Search

EXPERTS = problem(expert_model(8), two_cards(800, 400), prompt_tokens=4000)
DENSE = problem(dense_model(8), two_cards(800, 400))
PLAN = ComputePlan({"CUDA0": 3, "CUDA1": 5, "Host": 7}, 11, 13, 17, 19, 4, True, ())


def test_table_is_by_position() -> None:
    """The host comes first, then the configuration's cards in its own order."""
    assert compute_table(configuration(EXPERTS, "CUDA1", "CUDA0"), PLAN).n_bytes == (7, 5, 3)


def test_counts() -> None:
    """Splits, nodes and copies are the plan's."""
    counts = graph_counts(PLAN)
    assert (counts.splits_prompt, counts.splits_decode) == (11, 13)
    assert (counts.n_nodes_prompt, counts.n_nodes_decode, counts.n_copies) == (17, 19, 4)


@pytest.mark.parametrize("asked", [EXPERTS, DENSE], ids=["experts", "dense"])
@pytest.mark.parametrize("names", [("CUDA0",), ("CUDA0", "CUDA1"), ("CUDA1", "CUDA0")])
@pytest.mark.parametrize("uses_host", [True, False])
def test_typical_assignment_is_valid(asked: Problem, names: tuple[str, ...], uses_host: bool) -> None:
    """Every card has a layer, in its order; the host is used where the configuration uses it, and only there."""
    found = typical_assignment(asked, configuration(asked, *names, uses_host=uses_host))
    assert len(found.homes) == 9
    assert tuple(dict.fromkeys(home for home in found.homes if home != CPU)) == names
    assert (CPU in found.homes or any(at == CPU for _, at in found.moved)) is uses_host


def test_typical_assignment_without_gpu() -> None:
    """Without a card everything is on the CPU."""
    assert set(typical_assignment(DENSE, configuration(DENSE)).homes) == {CPU}


def test_pipelined_configuration_has_no_override() -> None:
    """The typical placement of a pipeline keeps its four copies; any other configuration of two cards gives them up."""
    piped = configuration(EXPERTS, "CUDA0", "CUDA1", uses_host=False, is_pipelined=True)
    plain = configuration(EXPERTS, "CUDA0", "CUDA1", uses_host=False)
    assert not typical_assignment(EXPERTS, piped).settings.has_overrides
    assert typical_assignment(EXPERTS, plain).settings.has_overrides
    buffers = Search(EXPERTS).buffers
    assert buffers.exact(piped).counts.n_copies == 4
    assert buffers.exact(plain).counts.n_copies == 1


@pytest.mark.parametrize("ubatch_tokens", [256, 512, 2048])
def test_typical_placement_is_planned(ubatch_tokens: int) -> None:
    """The estimate is the plan of the typical placement at the configuration's own ubatch."""
    asked_configuration = configuration(
        EXPERTS, "CUDA0", "CUDA1", ubatch_tokens=ubatch_tokens, batch_tokens=2048
    )
    search = Search(EXPERTS)
    plan = search.plan(typical_assignment(EXPERTS, asked_configuration))
    assert (
        search.buffers.exact(asked_configuration).n_bytes == compute_table(asked_configuration, plan).n_bytes
    )


def test_few_plans_serve_many_configurations() -> None:
    """Load modes share their plans: an ubatch of one order needs two at most, early layers in host memory one."""
    planned: list[Assignment] = []

    def planner(assignment: Assignment) -> ComputePlan:
        planned.append(assignment)
        return PLAN

    buffers = Buffers(EXPERTS, planner)
    for ubatch_tokens in (256, 512, 1024, 2048, 4096):
        for load_mode in ("auto", "none"):
            buffers.exact(
                configuration(EXPERTS, "CUDA0", "CUDA1", ubatch_tokens=ubatch_tokens, load_mode=load_mode)
            )
    assert len(set(planned)) <= 2 * 5 * 2
    assert len({each.settings.ubatch_tokens for each in planned}) == 5
