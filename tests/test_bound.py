"""A configuration's lower bound before its frame is built, against what CP-SAT then finds."""

from __future__ import annotations

import dataclasses

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from solving_support import card, dense_model, expert_model, problem, two_cards

from placement.inputs.machine import Machine
from placement.solve.cpsat.placing import Placing
from placement.solve.frames.pieces import Pins
from placement.solve.search.configurations import SearchSpace, configurations
from placement.solve.search.search import Search

MODELS = [expert_model(4), dense_model(5)]


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    """One to five cards and workers of any size, bandwidth and link."""
    names = [f"RPC{i}" for i in range(draw(st.integers(0, 1)))]
    names += [f"CUDA{i}" for i in range(draw(st.integers(1, 4)))]
    devices = tuple(
        card(
            name,
            draw(st.sampled_from([80.0, 200.0, 500.0, 2000.0])),
            bandwidth_gb_per_s=draw(st.sampled_from([20.0, 300.0, 1000.0])),
            link_gb_per_s=draw(st.sampled_from([1.0, 25.0])),
            address="10.0.0.1:50052" if name.startswith("RPC") else None,
        )
        for name in names
    )
    return dataclasses.replace(
        two_cards(1, 1, host_mib=draw(st.sampled_from([300.0, 9000.0]))), devices=devices
    )


@given(
    model=st.sampled_from(MODELS),
    machine=machines(),
    weights=st.sampled_from([(1, 1), (1000, 1), (1, 1000), (1, 0), (0, 1)]),
    pins=st.sampled_from(
        [Pins(), Pins(groups=((1, "down", "CPU"),)), Pins(homes=((0, frozenset({"CPU"})),))]
    ),
)
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
def test_lower_bound_is_below_the_optimum(
    model: object, machine: Machine, weights: tuple[int, int], pins: Pins
) -> None:
    """Whatever the cards, weights and pins, nothing that CP-SAT finds is below its configuration's bound."""
    search = Search(problem(model, machine))  # type: ignore[arg-type]
    space = SearchSpace(ubatches=(512,), pins=pins, decode_weight=weights[0], prompt_weight=weights[1])
    bounds = {lower_bound.configuration: lower_bound.bound for lower_bound in search.lower_bounds(space)}
    fastest = max(each.bandwidth_gb_per_s for each in machine.devices)
    every = list(configurations(search.problem, space))
    for configuration in every[:: max(1, len(every) // 4)]:
        subproblem = search.subproblem(configuration, space)
        if subproblem is None:
            continue
        result = Placing(subproblem.table.frame, *weights).program.solve(10.0, 0.0, seed=1)
        if result.objective is None:
            continue
        if configuration in bounds:
            assert bounds[configuration] <= result.objective + 1e-6
        else:  # left out for its slow cards alone
            assert any(machine.device(name).bandwidth_gb_per_s < fastest for name in configuration.devices)
