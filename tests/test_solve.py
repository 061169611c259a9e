"""Whole solves of small models: what is recommended fits, is proven, and nothing tried at random is better."""

from __future__ import annotations

import dataclasses
import re
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from solving_support import (
    card,
    configuration,
    dense_model,
    expert_model,
    one_card,
    random_answer,
    table_of,
    two_cards,
)

from placement.errors import InputError
from placement.inputs.machine import Coefficient, Machine
from placement.inputs.model import Model, Profile
from placement.inputs.problem import CPU
from placement.llamacpp.arguments import parse
from placement.llamacpp.compute import plan_compute
from placement.llamacpp.emit.resolve import resolve
from placement.predict.check import check_arguments, device_use
from placement.predict.cost import evaluate, graph_counts
from placement.predict.solution import SolutionSet
from placement.solve.request import Request
from placement.solve.solve import make_problem, solve_request

EXPERTS, DENSE = expert_model(8), dense_model(10)
ASKED = Request(prompt_tokens=1000, generate_tokens=200)
TIGHT = two_cards(500, 400)


def solved(model: Model, machine: Machine, **asked: object) -> SolutionSet:
    """The answer to the usual question with these constraints."""
    return solve_request(model, machine, dataclasses.replace(ASKED, **asked))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shown() -> SolutionSet:
    """The answer on two cards that hold the model, but not loosely."""
    return solved(EXPERTS, TIGHT)


@given(
    model=st.sampled_from([EXPERTS, DENSE]),
    first=st.integers(150, 1500),
    second=st.integers(150, 1500),
    host=st.sampled_from([100, 400, 4000]),
)
@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.too_slow])
def test_never_over_a_cap(model: Model, first: int, second: int, host: int) -> None:
    """On any two cards and host, every solution shown keeps within every cap, or nothing fits and a cap is named."""
    found = solved(model, two_cards(first, second, host_mib=host))
    assert all(use.headroom_mib >= 0 for each in found.solutions for use in each.devices.values())
    if not found.solutions:
        assert found.status == "INFEASIBLE"
        assert "lacks" in found.message


@pytest.mark.parametrize("model", [EXPERTS, DENSE], ids=["experts", "dense"])
@pytest.mark.parametrize("sizes", [(400, 250), (250, 400), (160, 700)])
def test_nothing_at_random_is_better(model: Model, sizes: tuple[int, int]) -> None:
    """No placement tried at random that fits has a shorter turn than the recommended one, its gap aside."""
    machine = two_cards(*sizes)
    found = solved(model, machine, ubatch_tokens=512)
    best = found.solutions[0]
    assert best.gap is not None
    asked, _ = make_problem(model, machine, ASKED)
    random, n_fitting = Random(1), 0
    for names in (("CUDA0", "CUDA1"), ("CUDA1", "CUDA0"), ("CUDA0",), ("CUDA1",)):
        table = table_of(asked, configuration(asked, *names, load_mode="none"))
        for _ in range(25):
            assignment = table.assignment(random_answer(table.frame, random))
            plan = plan_compute(asked.model, asked.machine, assignment, asked.program)
            if any(use.headroom_mib < 0 for use in device_use(asked, assignment, plan).values()):
                continue
            n_fitting += 1
            speed = evaluate(asked, assignment, graph_counts(plan))
            assert best.speed.turn_s * (1 - best.gap) <= speed.turn_s * 1.0005
    assert n_fitting > 0


@pytest.mark.parametrize("model", [EXPERTS, DENSE], ids=["experts", "dense"])
def test_arguments_mean_the_placement(model: Model) -> None:
    """Every solution's arguments are read back as its assignment, and checking them gives its figures."""
    machine = two_cards(400, 250)
    for each in solved(model, machine).solutions:
        arguments = parse(list(each.args))
        assert resolve(model, machine, arguments, "llama-server").homes == each.assignment.homes
        turn = make_problem(model, machine, ASKED)[0].workload
        result = check_arguments(model, machine, arguments, workload=turn)
        assert result.devices == each.devices
        assert result.speed.turn_s == pytest.approx(each.speed.turn_s, rel=1e-9)
        assert (result.splits_decode, result.splits_prompt) == (each.splits_decode, each.splits_prompt)


def test_same_answer_twice() -> None:
    """The same question has the same answer, to the last figure."""
    machine = two_cards(400, 250)
    first, second = (solved(EXPERTS, machine, ubatch_tokens=512) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("sizes", [(400, 250), (300, 300), (2000, 2000)])
def test_proven(sizes: tuple[int, int]) -> None:
    """The recommended placement is proven within half a percent."""
    best = solved(EXPERTS, two_cards(*sizes)).solutions[0]
    assert best.gap is not None
    assert best.gap <= 0.005
    assert best.status == "OPTIMAL"


def test_fast_card_alone_when_it_holds_all() -> None:
    """A model that fits the fast card never touches the slow one or the host."""
    best = solved(EXPERTS, two_cards(4000, 4000)).solutions[0]
    assert best.assignment.devices == ("CUDA0",)
    assert set(best.assignment.homes) == {"CUDA0"}
    assert best.splits_decode == 2


def test_fast_card_is_found_by_speed() -> None:
    """The fast card is the fast one, wherever it stands in the engine's order."""
    machine = two_cards(4000, 4000, bandwidth_gb_per_s=3000.0)
    assert solved(EXPERTS, machine).solutions[0].assignment.devices == ("CUDA1",)


def test_first_solution_is_aggressive_then_moderate(shown: SolutionSet) -> None:
    """The fastest comes first; moderate leaves 5 % of every card's total free and is no faster."""
    first, second = shown.solutions[:2]
    assert (first.name, second.name) == ("aggressive", "moderate")
    assert first.speed.turn_s <= second.speed.turn_s * 1.002
    for name in second.assignment.devices:
        assert second.devices[name].headroom_mib >= 0.05 * TIGHT.device(name).total_mib


def test_names_are_unique(shown: SolutionSet) -> None:
    """No two solutions have one name."""
    names = [each.name for each in shown.solutions]
    assert len(names) == len(set(names))


def test_none_is_shown_twice(shown: SolutionSet) -> None:
    """No two solutions shown have the same arguments."""
    rows = [each.args for each in shown.solutions[2:]]
    assert len(rows) == len(set(rows))


def test_reserve_is_kept() -> None:
    """A reserve stays free on every card in every solution."""
    machine = two_cards(500, 400)
    for each in solved(EXPERTS, machine, reserve_mib=80.0, ubatch_tokens=512).solutions:
        for name in each.assignment.devices:
            use = each.devices[name]
            assert use.used_mib <= machine.device(name).usable_mib - 80.0


def test_fixed_ubatch() -> None:
    """A fixed ubatch is the only one shown."""
    found = solved(EXPERTS, two_cards(500, 400), ubatch_tokens=1024).solutions
    assert {each.assignment.settings.ubatch_tokens for each in found} == {1024}


def test_objectives() -> None:
    """Asked for decode or prompts alone, that speed is at least what a turn's best has."""
    machine = two_cards(500, 300)
    turn, decode, prompt = (
        solved(EXPERTS, machine, objective=each, load_modes=("none",)).solutions[0].speed
        for each in ("turn", "decode", "prompt")
    )
    assert decode.decode_tps >= turn.decode_tps * 0.998
    assert (prompt.prompt_tps or 0) >= (turn.prompt_tps or 0) * 0.99


def test_machine_without_gpu() -> None:
    """Without a GPU everything is on the CPU."""
    machine = Machine("host", (), one_card(1).cpu)
    best = solved(DENSE, machine).solutions[0]
    assert set(best.assignment.homes) == {CPU}
    assert best.args[:2] == ("-ngl", "0")


def test_three_cards() -> None:
    """Three unequal cards are used in an order of the solver's choice, each at most once."""
    machine = dataclasses.replace(
        two_cards(300, 300), devices=(*two_cards(300, 300).devices, card("CUDA2", 300))
    )
    best = solved(EXPERTS, machine, ubatch_tokens=512).solutions[0]
    assert len(set(best.assignment.devices)) == len(best.assignment.devices) >= 2
    assert best.assignment.homes.count(CPU) == 0


@pytest.mark.parametrize(("card_mib", "host_mib"), [(40, 200), (100, 100), (400, 300)])
def test_infeasible_names_the_caps(card_mib: int, host_mib: int) -> None:
    """Where card and host together are too small, the message says which lacks how much."""
    found = solved(EXPERTS, one_card(card_mib, host_mib))
    assert (found.status, found.solutions) == ("INFEASIBLE", ())
    assert re.search(r"(CPU|CUDA0) lacks [\d,]+ MiB", found.message)


def test_useless_card_is_left_out() -> None:
    """A card too small for any layer leaves everything to a host that has room."""
    best = solved(EXPERTS, one_card(40)).solutions[0]
    assert set(best.assignment.homes) == {CPU}


def test_what_is_lacking_makes_it_fit() -> None:
    """Given the MiB that the message names, and a little for rounding, the same question has an answer."""
    found = solved(EXPERTS, Machine("host", (), dataclasses.replace(one_card(1).cpu, usable_mib=500.0)))
    lacking = float(found.message.split("CPU lacks ")[1].split(" MiB")[0].replace(",", ""))
    enough = dataclasses.replace(one_card(1).cpu, usable_mib=501.0 + lacking)
    short = dataclasses.replace(one_card(1).cpu, usable_mib=490.0 + lacking)
    assert solved(EXPERTS, Machine("host", (), enough)).solutions
    assert not solved(EXPERTS, Machine("host", (), short)).solutions


def test_profile_fills_in() -> None:
    """Context, KV type, slots and kept arguments come from the profile; what is asked comes before it."""
    model = dataclasses.replace(EXPERTS, profile=Profile(2048, "q4_0", 2, ("--jinja",)))
    asked, _ = make_problem(model, one_card(2000), ASKED)
    assert (asked.settings.ctx_tokens, asked.settings.kv_type_k, asked.settings.n_slots) == (2048, "q4_0", 2)
    other, _ = make_problem(model, one_card(2000), dataclasses.replace(ASKED, ctx_tokens=1024, kv_type="F16"))
    assert (other.settings.ctx_tokens, other.settings.kv_type_v) == (1024, "f16")
    assert solved(model, one_card(2000)).extra_args == ("--jinja",)


def test_unprofiled_model_has_its_trained_context() -> None:
    """Without a profile the trained context and f16 are asked for."""
    model = dataclasses.replace(EXPERTS, profile=Profile())
    asked, warnings = make_problem(model, one_card(2000), ASKED)
    assert (asked.settings.ctx_tokens, asked.settings.kv_type_k, warnings) == (32768, "f16", [])


@pytest.mark.parametrize(
    ("ctx", "n_slots", "n_warnings"), [(32768, 1, 0), (32769, 1, 1), (65536, 2, 0), (65537, 2, 1)]
)
def test_context_over_the_trained_one_warns(ctx: int, n_slots: int, n_warnings: int) -> None:
    """The trained context is each slot's; one token more is a warning."""
    _, warnings = make_problem(
        EXPERTS, one_card(2000), dataclasses.replace(ASKED, ctx_tokens=ctx, n_slots=n_slots)
    )
    assert n_warnings == len(warnings)


@pytest.mark.parametrize(
    "asked",
    [{"kv_type": "q9"}, {"ctx_tokens": -1}, {"n_slots": -1}, {"prompt_tokens": 0}, {"generate_tokens": 0}],
)
def test_broken_request(asked: dict[str, object]) -> None:
    """A number below 1 or an unknown KV type is an input error that names the option."""
    with pytest.raises(InputError, match=r"^--"):
        make_problem(EXPERTS, one_card(2000), dataclasses.replace(ASKED, **asked))  # type: ignore[arg-type]


def test_moderate_keeps_what_runs_have_taught() -> None:
    """A learned margin replaces the 5 % of the card that moderate keeps free otherwise."""
    card = one_card(600)
    taught = dataclasses.replace(
        card, coefficients={"margin_mib.CUDA0": Coefficient(100.0, "MiB", "calibrated")}
    )
    plain, learned = (
        next(each for each in solved(EXPERTS, machine).solutions if each.name == "moderate")
        for machine in (card, taught)
    )
    assert plain.headroom_mib >= 0.05 * 600
    assert learned.headroom_mib >= 100
