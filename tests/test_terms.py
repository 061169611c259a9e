"""One table of terms: what `evaluate`, the solver's frames and the fits make of it is the same, and all of it."""

from __future__ import annotations

import dataclasses
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solving_support import card, configuration, dense_model, expert_model, problem, random_answer, two_cards

from placement.inputs.coefficients import DEFAULTS, DIVISORS, SERVED_BY
from placement.inputs.machine import Coefficient, Machine
from placement.inputs.problem import Problem
from placement.measure.calibrate.features import decode_row, predict_s, prompt_row
from placement.predict import terms
from placement.predict.cost import GraphCounts, evaluate
from placement.predict.loads import QUANTITIES
from placement.predict.terms import (
    DECODE,
    PROMPT,
    TERMS,
    Phase,
    Rate,
    Term,
    coefficient,
    coefficients_of,
    fitted_in,
)
from placement.solve.cpsat.frame import times_us
from placement.solve.frames.pieces import Pieces
from placement.solve.frames.tables import ComputeTable, TableBuilder

MODELS = [expert_model(6), dense_model(5)]
COUNTS = GraphCounts(splits_prompt=3, splits_decode=3, n_nodes_prompt=110, n_nodes_decode=100)
# The frames foresee how many splits an answer has, `COUNTS` says it: here they take no time.
NO_SPLITS = {"split_us": 0.0, "boundary_us": 0.0, "thread_us": 0.0}


def knowing(machine: Machine, **values: float) -> Machine:
    """The machine with these coefficients, and splits that take no time."""
    known = {name: Coefficient(value, "") for name, value in {**NO_SPLITS, **values}.items()}
    return dataclasses.replace(machine, coefficients=known)


def three_sums(asked: Problem, seed: int, **settings: object) -> dict[str, tuple[float, float]]:
    """(decode, prompt) microseconds of a turn of a random answer, by each of the three that say it."""
    names = tuple(device.name for device in asked.machine.devices)
    table = TableBuilder(Pieces(asked), configuration(asked, *names, **settings)).build(
        ComputeTable((0,) * (len(names) + 1), COUNTS)
    )
    answer = random_answer(table.frame, Random(seed))
    placed = asked, table.assignment(answer), COUNTS
    speed, n = evaluate(*placed), asked.workload.generate_tokens
    rows = decode_row(*placed), prompt_row(*placed)
    decode_s, prompt_s = (predict_s(row, asked.machine) for row in rows)
    return {
        "evaluate": (speed.decode_s * n * 1e6, speed.prompt_s * 1e6),
        "frame": times_us(table.frame, answer),
        "fit": (decode_s * n * 1e6, prompt_s * 1e6),
    }


def table_powers() -> list[tuple[str, int]]:
    """Every coefficient of the table with its power."""
    rates = [(term, rate) for term in TERMS for rate in term.rates]
    return [power for term, rate in rates for power in (*term.powers, *rate.powers)]


def test_each_term_is_listed_once() -> None:
    """No two rows of a phase have one name, or multiply the same."""
    rows = [(term.phase, term.name) for term in TERMS]
    products = [(term.phase, term.quantity, term.rates, term.powers) for term in TERMS]
    assert (len(TERMS), len(TERMS)) == (len(set(rows)), len(set(products)))


def test_a_term_multiplies_what_loads_have() -> None:
    """Every quantity is one of a load's, and every one of these is in a term."""
    assert set(QUANTITIES) == {term.quantity for term in TERMS}


def test_no_coefficient_is_dead_or_unknown() -> None:
    """The coefficients that a machine file may hold are those that a time depends on."""
    assert set(DEFAULTS) == coefficients_of(DECODE) | coefficients_of(PROMPT)


def test_what_is_divided_by_may_not_be_zero() -> None:
    """A machine file may not say 0 of a coefficient that stands below a line."""
    assert {name for name, power in table_powers() if power < 0} == DIVISORS


def test_what_can_be_learned_is_fitted_once() -> None:
    """Decode's runs or prompts' teach each coefficient that has a spread, never both."""
    learned = [*fitted_in(DECODE), *fitted_in(PROMPT)]
    assert sorted(name for name, each in DEFAULTS.items() if each.spread is not None) == sorted(learned)


def test_device_coefficient_comes_first() -> None:
    """NAME.DEVICE overrides NAME for that device; a silent file means the default."""
    table = {"read_efficiency": Coefficient(0.5, ""), "read_efficiency.CUDA1": Coefficient(0.7, "")}
    machine = dataclasses.replace(two_cards(1, 1), coefficients=table)
    names = ("read_efficiency.CUDA0", "read_efficiency.CUDA1", "node_us")
    assert [0.5, 0.7, DEFAULTS["node_us"].value] == [coefficient(machine, name) for name in names]


@pytest.mark.parametrize(("name", "other"), SERVED_BY.items())
def test_another_serves_where_a_file_is_silent(name: str, other: str) -> None:
    """Not the coefficient's own default, nor what the file says of other places."""
    table = {other: Coefficient(0.123, ""), "kv_read_efficiency": Coefficient(0.9, "")}
    assert coefficient(dataclasses.replace(two_cards(1, 1), coefficients=table), name) == 0.123


def layer_rates(name: str) -> tuple[Rate, ...]:
    """A coefficient in microseconds, on whatever place."""
    return tuple(Rate(kind, "us", ((name, 1),)) for kind in ("device", "host", "graph"))


@pytest.mark.parametrize(
    ("phase", "quantity", "expected"),
    [
        (DECODE, "n_layers", 6 * 200 * 1000.0),
        (DECODE, "n_graphs", 200 * 1000.0),
        (PROMPT, "n_layers", 6 * 1000.0),
        (PROMPT, "n_graphs", 2 * 1000.0),
    ],
)
def test_a_new_row_counts_everywhere(
    monkeypatch: pytest.MonkeyPatch, phase: Phase, quantity: str, expected: float
) -> None:
    """Another term of 1,000 us, of six layers or of each graph, is in all three sums, and in no other phase's."""
    asked = problem(expert_model(6), knowing(two_cards(4000, 3000), node_us=1000.0))
    before = three_sums(asked, 1)
    monkeypatch.setattr(terms, "TERMS", (*TERMS, Term("new", phase, quantity, layer_rates("node_us"))))
    for who, (decode_us, prompt_us) in three_sums(asked, 1).items():
        more = decode_us - before[who][0], prompt_us - before[who][1]
        wanted = (expected, 0.0) if phase == DECODE else (0.0, expected)
        assert wanted == pytest.approx(more, abs=1e-3), who


def test_a_new_row_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coefficient that only prompts had is decode's to teach once a token's time depends on it."""
    new = Term("new", DECODE, "n_layers", layer_rates("compute_half_tokens"))
    monkeypatch.setattr(terms, "TERMS", (*TERMS, new))
    assert "compute_half_tokens" in fitted_in(DECODE)
    assert "compute_half_tokens" not in fitted_in(PROMPT)


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    """One to three cards of which some do not say their throughput, and any coefficients."""
    devices = tuple(
        card(f"CUDA{i}", 4000, tflops=draw(st.sampled_from([None, 88.0])))
        for i in range(draw(st.integers(1, 3)))
    )
    values = st.floats(0.05, 1.0)
    names = [name for name in DEFAULTS if name not in NO_SPLITS]
    names += [f"{name}.CUDA0" for name in names if DEFAULTS[name].scope in ("device", "place", "cuda")]
    names += [f"{name}.CPU" for name in DEFAULTS if DEFAULTS[name].scope == "place"]
    known = draw(st.dictionaries(st.sampled_from(names), values))
    return knowing(dataclasses.replace(two_cards(1, 1), devices=devices), **known)


@given(
    model=st.sampled_from(MODELS),
    machine=machines(),
    seed=st.integers(0, 99),
    is_kv_offloaded=st.booleans(),
    load_mode=st.sampled_from(["auto", "none"]),
    n_threads=st.sampled_from([None, 1, 4]),
    prompt_tokens=st.sampled_from([0, 20, 700, 3000]),
)
@settings(deadline=None, max_examples=40)
def test_the_three_sums_are_one(
    model: object, machine: Machine, seed: int, prompt_tokens: int, **given: object
) -> None:
    """`evaluate`, a frame and a fit's rows say the same of any answer on any machine, to each layer's rounding."""
    asked = problem(model, machine, prompt_tokens=prompt_tokens)  # type: ignore[arg-type]
    sums = three_sums(asked, seed, **given)
    n_layers = asked.model.get("block_count") + 1
    assert sums["fit"] == pytest.approx(sums["evaluate"], rel=1e-9)
    assert sums["frame"] == pytest.approx(sums["evaluate"], rel=1e-9, abs=2 * n_layers)
