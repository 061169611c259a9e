from __future__ import annotations

import dataclasses

import pytest
from solving_support import card, dense_model, expert_model, one_card, problem, two_cards

from placement.inputs.coefficients import DEFAULTS
from placement.inputs.machine import Coefficient, Machine
from placement.predict.check import device_use
from placement.predict.cost import evaluate, graph_counts
from placement.predict.loads import QUANTITIES
from placement.predict.rates import rates
from placement.predict.terms import DECODE
from placement.solve.cpsat.frame import is_valid
from placement.solve.search.configurations import UBATCHES, SearchSpace, configurations, device_orders
from placement.solve.search.search import Search, shortfall

TWO = two_cards(400, 250)
EXPERTS = problem(expert_model(8), TWO)


def orders(*devices: object) -> set[tuple[str, ...]]:
    """The orders of a machine with these devices."""
    machine = dataclasses.replace(TWO, devices=devices)
    return set(device_orders(dataclasses.replace(EXPERTS, machine=machine)))


def test_orders_of_unequal_cards() -> None:
    """Two unequal cards: each alone, and both orders."""
    assert orders(*TWO.devices) == {("CUDA0",), ("CUDA1",), ("CUDA0", "CUDA1"), ("CUDA1", "CUDA0")}


def test_equal_cards_are_interchangeable() -> None:
    """Two equal cards: one alone and both, each once, whatever their identities are."""
    assert orders(card("CUDA0", 400, uuid="a"), card("CUDA1", 400, uuid="b")) == {
        ("CUDA0",),
        ("CUDA0", "CUDA1"),
    }


def test_two_equal_of_three() -> None:
    """Of two equal cards and another, no order appears with the equal ones exchanged."""
    result = orders(card("CUDA0", 400), card("CUDA1", 400), card("CUDA2", 800))
    kinds = {"CUDA0": "a", "CUDA1": "a", "CUDA2": "b"}
    patterns = [tuple(kinds[name] for name in order) for order in result]
    assert len(patterns) == len(set(patterns)) == 2 + 3 + 3


def test_cards_that_differ_in_one_number_are_unequal() -> None:
    """A slower link is a difference: it decides which card weights are streamed to."""
    assert len(orders(card("CUDA0", 400), card("CUDA1", 400, link_gb_per_s=12.0))) == 4


def test_many_cards_have_few_orders() -> None:
    """Eight unequal cards are tried in the engine's order and by speed, not in 100,000 orders."""
    devices = [card(f"CUDA{i}", 400, bandwidth_gb_per_s=500.0 + 100 * i) for i in range(8)]
    assert 8 <= len(orders(*devices)) <= 16


def test_configurations_without_gpu() -> None:
    """Without a GPU there is the host, in each load mode and ubatch."""
    asked = problem(dense_model(2), Machine("host", (), TWO.cpu))
    results = list(configurations(asked, SearchSpace()))
    assert {each.devices for each in results} == {()}
    assert all(each.uses_host for each in results)


def test_batch_holds_the_ubatch() -> None:
    """No configuration has an ubatch over its batch."""
    results = list(configurations(EXPERTS, SearchSpace()))
    assert all(each.settings.ubatch_tokens <= each.settings.batch_tokens for each in results)
    assert {each.settings.ubatch_tokens for each in results} <= set(UBATCHES)


def test_only_several_cards_pipeline() -> None:
    """A pipeline needs two cards and no host."""
    results = [each for each in configurations(EXPERTS, SearchSpace()) if each.is_pipelined]
    assert results
    assert all(len(each.devices) > 1 and not each.uses_host for each in results)


def test_ubatches_beyond_the_prompt_are_left_out() -> None:
    """A short prompt has no use for large ubatches, but some ubatch is always tried."""
    short = problem(expert_model(8), TWO, prompt_tokens=100)
    assert {each.settings.ubatch_tokens for each in configurations(short, SearchSpace())} == {256}
    assert {each.settings.ubatch_tokens for each in configurations(short, SearchSpace(ubatches=(4096,)))} == {
        4096
    }


@pytest.fixture(scope="module")
def search() -> Search:
    """A search on two cards that hold half of the model."""
    return Search(EXPERTS, time_limit_s=30.0)


def test_lower_bounds_are_sorted(search: Search) -> None:
    """The configuration of the least lower bound comes first."""
    bounds = [lower_bound.bound for lower_bound in search.lower_bounds(SearchSpace())]
    assert bounds == sorted(bounds)
    assert bounds[0] > 0


def test_best_is_above_its_bound(search: Search) -> None:
    """What is found is no better than its proof allows, and within the gap of it."""
    result = search.best(SearchSpace(), search.lower_bounds(SearchSpace()))
    assert result is not None
    assert result.bound <= result.objective <= result.bound * 1.005
    assert result.is_proven


def test_best_is_what_evaluate_says(search: Search) -> None:
    """The frame's objective of what is found is the turn that `evaluate` predicts, within a thousandth."""
    result = search.best(SearchSpace(), search.lower_bounds(SearchSpace()))
    assert result is not None
    assert result.objective == pytest.approx(result.speed.turn_s * 1e6, rel=0.001)


def test_no_configuration_has_a_better_greedy_answer(search: Search) -> None:
    """No configuration's greedy answer, taken as it is, beats what was found by more than the gap."""
    lower_bounds = search.lower_bounds(SearchSpace())
    result = search.best(SearchSpace(), lower_bounds)
    assert result is not None
    for lower_bound in lower_bounds:
        if (subproblem := search.subproblem(lower_bound.configuration, SearchSpace())) is None:
            continue
        answer = subproblem.relaxation.answer()
        if answer is None:
            continue
        assert is_valid(subproblem.table.frame, answer)
        assignment = subproblem.table.assignment(answer)
        plan = search.plan(assignment)
        if all(use.headroom_mib >= 0 for use in device_use(EXPERTS, assignment, plan).values()):
            speed = evaluate(EXPERTS, assignment, graph_counts(plan))
            assert speed.turn_s >= result.speed.turn_s * 0.995


def test_plans_are_kept(search: Search) -> None:
    """A placement is planned once."""
    result = search.best(SearchSpace(), search.lower_bounds(SearchSpace()))
    assert result is not None
    assert search.plan(result.assignment) is search.plan(result.assignment)


@pytest.mark.parametrize("limit", [0, 2])
def test_host_layers_can_be_limited(limit: int) -> None:
    """At most so many layers keep anything in host memory; where that cannot be, nothing is found."""
    asked = problem(expert_model(8), one_card(700))
    space = SearchSpace(ubatches=(512,), max_host_layers=limit)
    search = Search(asked)
    result = search.best(space, search.lower_bounds(space))
    free = Search(asked)
    anything = free.best(SearchSpace(ubatches=(512,)), free.lower_bounds(SearchSpace(ubatches=(512,))))
    assert anything is not None
    n_free = len({name.split(".")[1] for name, at in anything.assignment.moved if at == "CPU"})
    if result is None:
        assert n_free > limit
        return
    on_host = {int(name.split(".")[1]) for name, at in result.assignment.moved if at == "CPU"}
    on_host |= {i for i, home in enumerate(result.assignment.homes) if home == "CPU"}
    assert len(on_host) <= limit


def test_shortfall_is_the_least() -> None:
    """What a card lacks without a host is the model less the card, to a few MiB."""
    asked = problem(expert_model(8), one_card(300, host_mib=20))
    words = shortfall(Search(asked), SearchSpace())
    lacking = sum(float(part.split()[2].replace(",", "")) for part in words.split(" and "))
    size_mib = asked.model.n_bytes / 2**20
    assert size_mib - 320 <= lacking <= size_mib - 320 + 150


def knowing(**values: float) -> Machine:
    """A card that holds a third of the model, on a host of eight cores that knows these coefficients."""
    known = {name: Coefficient(value, DEFAULTS[name].unit) for name, value in values.items()}
    return dataclasses.replace(one_card(300), coefficients=known)


def threads_of(machine: Machine, **settings: int) -> tuple[set[int | None], int | None]:
    """The thread counts tried for the experts' model, and the one selected."""
    asked = problem(expert_model(8), machine)
    asked = dataclasses.replace(asked, settings=dataclasses.replace(asked.settings, **settings))
    space = SearchSpace(ubatches=(512,))
    search = Search(asked)
    result = search.best(space, search.lower_bounds(space))
    assert result is not None
    tried = {each.settings.n_threads for each in configurations(asked, space) if each.uses_host}
    return tried, result.assignment.settings.n_threads


def test_threads_are_the_engines_by_default() -> None:
    """Where nothing is known of what a thread costs, the engine's own choice stands."""
    assert threads_of(knowing()) == ({None}, None)


def test_fewer_threads_where_each_costs_more_than_it_reads() -> None:
    """Where threads cost time at every split and few read all that memory gives, few are selected; else all."""
    dear = threads_of(knowing(thread_us=100.0, cpu_thread_gb_per_s=100.0))
    assert dear == ({None, 2, 4, 6}, 2)
    assert threads_of(knowing(thread_us=0.01, cpu_thread_gb_per_s=1.0))[1] is None


def test_fixed_threads_stay() -> None:
    """A number of threads that the user keeps is the only one tried, and is priced."""
    assert threads_of(knowing(thread_us=100.0), n_threads=5) == ({5}, 5)
    few, many = (
        rates(one_card(300), ("CUDA0",), dataclasses.replace(EXPERTS.settings, n_threads=n)) for n in (1, 8)
    )
    few_s, many_s = (each.at(DECODE, "CPU")[QUANTITIES.index("dense_quant_bytes")] for each in (few, many))
    assert few_s == pytest.approx(1 / 10e9)
    assert many_s == pytest.approx(1 / (50e9 * DEFAULTS["cpu_read_efficiency"].value))


def test_fine_pipelines_only_where_they_were_measured() -> None:
    """Several ubatches of less than 512 tokens in flight are tried where the overlap is known, or nothing else is."""
    space, fixed = SearchSpace(ubatches=(256, 512, 1024)), SearchSpace(ubatches=(256,))

    def pipelined(machine: Machine, allowed: SearchSpace) -> set[int]:
        asked = dataclasses.replace(EXPERTS, machine=machine)
        return {each.settings.ubatch_tokens for each in configurations(asked, allowed) if each.is_pipelined}

    measured = {"pipeline_overlap": Coefficient(0.4, "fraction", "calibrated")}
    assert pipelined(TWO, space) == {512, 1024}
    assert pipelined(TWO, fixed) == {256}
    assert pipelined(dataclasses.replace(TWO, coefficients=measured), space) == {256, 512, 1024}
