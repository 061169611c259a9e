from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
from solving_support import configuration, expert_model, problem, table_of, two_cards
from test_cpsat import answers, best_by_brute_force, crossing_frame, frames

from placement.solve.cpsat.frame import Answer, Frame, GroupChoice, LayerTable, is_valid, times_us
from placement.solve.cpsat.placing import Placing
from placement.solve.cpsat.relaxation import Relaxation

WEIGHTS = st.sampled_from([(1, 1), (1, 0), (0, 1), (3, 1)])


@given(frame=frames(), weights=WEIGHTS)
@settings(deadline=None, max_examples=200)
def test_bound_below_optimum(frame: Frame, weights: tuple[int, int]) -> None:
    """The relaxation's bound is at most the optimum, and it calls nothing impossible that is possible."""
    relaxed = Relaxation(frame, *weights).bound()
    best = best_by_brute_force(frame, *weights)
    if best is not None:
        assert relaxed.bound is not None
        assert relaxed.bound <= best + 1e-6 * abs(best)


@given(frame=frames(), weights=WEIGHTS)
@settings(deadline=None, max_examples=200)
def test_greedy_answer_is_an_answer(frame: Frame, weights: tuple[int, int]) -> None:
    """A greedy answer keeps every rule, and its objective is no better than the optimum."""
    relaxation = Relaxation(frame, *weights)
    answer = relaxation.answer()
    if answer is None:
        return
    assert is_valid(frame, answer)
    best = best_by_brute_force(frame, *weights)
    assert best is not None
    assert best <= relaxation.objective(answer)


@given(frame=frames(), weights=WEIGHTS, more=st.integers(0, 3))
@settings(deadline=None, max_examples=100)
def test_homes_hold_all_that_is_good(frame: Frame, weights: tuple[int, int], more: int) -> None:
    """Every answer of at most some objective lives where the bound says that such answers may live."""
    relaxation = Relaxation(frame, *weights)
    relaxed = relaxation.bound()
    best = best_by_brute_force(frame, *weights)
    if relaxed.bound is None or best is None:
        return
    homes = relaxation.homes(relaxed, best + more)
    for answer in answers(frame):
        if is_valid(frame, answer) and relaxation.objective(answer) <= best + more:
            assert all(home in allowed for home, allowed in zip(answer.homes, homes, strict=True))


@given(frame=frames(), prices=st.lists(st.floats(0, 10), min_size=3, max_size=3))
@settings(deadline=None, max_examples=100)
def test_any_prices_give_a_bound(frame: Frame, prices: list[float]) -> None:
    """Under whatever prices, the bound holds."""
    relaxed = Relaxation(frame).bound(tuple(prices[: len(frame.positions)]))
    best = best_by_brute_force(frame, 1, 1)
    if best is not None:
        assert relaxed.bound is not None
        assert relaxed.bound <= best + 1e-6 * abs(best)


def two_layer_frame(cap_kib: int) -> Frame:
    """Two layers of 10 KiB on one card; in host memory each costs 5 us more."""
    rows = ((), (GroupChoice((1,), 1, 1, ((1, 10),)), GroupChoice((0,), 4, 3, ((0, 10), (1, 0)), True)))
    return Frame(("CPU", "CUDA0"), (LayerTable(0, 0, rows),) * 2, (100, cap_kib))


def test_bound_without_caps_is_the_optimum() -> None:
    """Where every layer's cheapest choice fits, the bound is the sum of them."""
    assert Relaxation(two_layer_frame(20)).bound().bound == 4


def test_greedy_moves_as_few_as_needed() -> None:
    """One layer of two goes to the host when one has room, the last one."""
    relaxation = Relaxation(two_layer_frame(10))
    assert relaxation.answer() == Answer((1, 1), (0, 1))


def test_impossible_caps_are_noticed() -> None:
    """A card that cannot hold what cannot move has no bound."""
    rows = ((), (GroupChoice((1,), 1, 1, ((1, 10),)),))
    frame = Frame(("CPU", "CUDA0"), (LayerTable(0, 0, rows),), (100, 9))
    assert Relaxation(frame).bound().bound is None


def test_close_on_a_real_frame() -> None:
    """On two cards that hold two thirds of a model, bound, optimum and greedy answer are within 5 %."""
    asked = problem(expert_model(12), two_cards(600, 300))
    frame = table_of(asked, configuration(asked, "CUDA0", "CUDA1")).frame
    relaxation = Relaxation(frame)
    relaxed = relaxation.bound()
    answer = relaxation.answer()
    result = Placing(frame).program.solve(20.0, 0.0, seed=1)
    assert answer is not None
    assert relaxed.bound is not None
    assert result.status == "OPTIMAL"
    assert result.objective is not None
    assert relaxed.bound <= result.objective <= relaxation.objective(answer)
    assert relaxation.objective(answer) <= 1.05 * relaxed.bound


def test_objective_is_the_frames() -> None:
    """The weighted objective is the frame's two times with their weights."""
    frame = dataclasses.replace(two_layer_frame(20), fixed_us=(100, 7))
    answer = Answer((1, 1), (0, 1))
    assert times_us(frame, answer) == (105, 11)
    assert Relaxation(frame, 3, 2).objective(answer) == 3 * 105 + 2 * 11


def test_hidden_boundary_is_in_the_bound() -> None:
    """Where one layer has to leave the first card, bound and answer count its boundary once."""
    relaxation = Relaxation(crossing_frame(10))
    relaxed = relaxation.bound()
    assert relaxed.bound == 107 + 57
    assert relaxation.answer() == Answer((1, 1, 2, 2), (0, 1, 0, 0))


@given(frame=frames(), weights=WEIGHTS, gap=st.sampled_from([0.0, 0.02]))
@settings(deadline=None, max_examples=300)
def test_bound_of_an_answer_holds(frame: Frame, weights: tuple[int, int], gap: float) -> None:
    """What the search over cuts has shown is no more than the optimum, and infinite only where there is none."""
    answer, bound = Relaxation(frame, *weights).answer_and_bound(gap)
    best = best_by_brute_force(frame, *weights)
    if best is not None:
        assert bound <= best + 1e-6 * abs(best)
    else:
        assert answer is None
