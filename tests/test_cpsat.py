"""The placement program against brute force on small frames."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.solve.cpsat.frame import (
    Answer,
    Extra,
    Frame,
    GroupChoice,
    LayerTable,
    is_alike,
    is_valid,
    times_us,
)
from placement.solve.cpsat.placing import Placing

small = st.integers(0, 9)


def dearer(draw: st.DrawFn, table: LayerTable, kind: int) -> LayerTable:
    """A kind with the same moves: every choice of a home costs the same more, and one home may be forbidden."""
    rows = []
    for home, row in enumerate(table.choices):
        decode, prompt, kib = draw(small), draw(small), draw(small)
        more = [
            dataclasses.replace(
                choice,
                decode_us=choice.decode_us + decode,
                prompt_us=choice.prompt_us + prompt,
                kib=tuple((p, each + kib if p == home else each) for p, each in choice.kib),
            )
            for choice in row
        ]
        rows.append(() if draw(st.integers(0, 5)) == 0 else tuple(more))
    return LayerTable(kind, table.moves, tuple(rows))


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    """Frames of up to five layers on up to three positions, of one to four kinds, caps near what is needed."""
    n_positions = draw(st.integers(1, 3))
    n_kinds = draw(st.integers(1, 3))
    kinds = []
    for kind in range(n_kinds):
        rows = []
        for home in range(n_positions):
            choices = [GroupChoice((home,), draw(small), draw(small), ((home, draw(small)),))]
            if home > 0 and draw(st.booleans()):
                for target in range(n_positions):
                    if target != home:
                        kib = ((home, draw(small)), (target, draw(small)))
                        choices.append(
                            GroupChoice((target,), draw(small), draw(small), kib, target == 0, target == 0)
                        )
            if home == 0 and n_positions > 1 and draw(st.booleans()):
                choices = []
            if home > 0 and len(choices) > 1 and draw(st.integers(0, 3)) == 0:
                choices = choices[1:]  # a pin leaves no choice that keeps all at home
            rows.append(tuple(choices))
        kinds.append(LayerTable(kind, kind, tuple(rows)))
    if draw(st.booleans()):
        kinds.append(dearer(draw, kinds[0], n_kinds))
    layers = tuple(kinds[k] for k in draw(st.lists(st.integers(0, len(kinds) - 1), min_size=1, max_size=5)))
    taken = [(k, p, 1) for k in range(n_kinds) for p in range(1, n_positions) if len(kinds[k].choices[p]) > 1]
    extras = (
        [Extra(frozenset(taken), tuple(draw(st.integers(0, 5)) for _ in range(n_positions)))] if taken else []
    )
    is_pipelined = draw(st.booleans())
    return Frame(
        positions=tuple(str(p) for p in range(n_positions)),
        layers=layers,
        cap_kib=tuple(draw(st.lists(st.integers(0, 30), min_size=n_positions, max_size=n_positions))),
        hidden_us=draw(st.sampled_from([(3, 2), (0, 0), (1, 2)]))
        if n_positions > 2 and not is_pipelined
        else (0, 0),
        fixed_us=(3, 5),
        extras=tuple(extras),
        max_host_layers=draw(st.one_of(st.none(), st.integers(0, 5))),
        max_decode_us=draw(st.one_of(st.none(), st.integers(3, 40))),
        longest_permille=draw(st.sampled_from([700, 2305])) if is_pipelined else 0,
    )


def answers(frame: Frame) -> Iterator[Answer]:
    """Every answer of a frame, valid or not."""
    for homes in itertools.combinations_with_replacement(range(len(frame.positions)), len(frame.layers)):
        counts = [range(len(table.choices[home])) for table, home in zip(frame.layers, homes, strict=True)]
        for picks in itertools.product(*counts):
            yield Answer(homes, picks)


def best_by_brute_force(frame: Frame, decode_weight: int, prompt_weight: int) -> int | None:
    """The least objective of all valid answers."""
    best = None
    for answer in answers(frame):
        if is_valid(frame, answer):
            decode, prompt = times_us(frame, answer)
            value = decode_weight * decode + prompt_weight * prompt
            best = value if best is None else min(best, value)
    return best


@given(frame=frames(), weights=st.sampled_from([(1, 1), (1, 0), (0, 1), (3, 1)]))
@settings(deadline=None, max_examples=2000)
def test_program_finds_what_brute_force_finds(frame: Frame, weights: tuple[int, int]) -> None:
    """The program's optimum, its answer's recomputed time and brute force agree on every small frame."""
    placing = Placing(frame, *weights)
    result = placing.program.solve(10.0, 0.0, seed=1)
    best = best_by_brute_force(frame, *weights)
    if best is None:
        assert result.status == "INFEASIBLE"
        return
    assert result.status == "OPTIMAL"
    answer = placing.answer(result.values)
    assert is_valid(frame, answer)
    decode, prompt = times_us(frame, answer)
    assert best == result.objective == weights[0] * decode + weights[1] * prompt


@given(frame=frames())
@settings(deadline=None, max_examples=50)
def test_same_answer_twice(frame: Frame) -> None:
    """The same frame and seed give the same values twice."""
    first, second = (Placing(frame).program.solve(10.0, 0.0, seed=1) for _ in range(2))
    assert first.values == second.values


def crossing_frame(cap_kib: int) -> Frame:
    """Four layers of 10 KiB on two cards; in host memory a layer costs 9 + 4 us more and ends there."""

    def rows(p: int) -> tuple[GroupChoice, ...]:
        return GroupChoice((p,), 1, 1, ((p, 10),)), GroupChoice((0,), 10, 5, ((0, 10), (p, 0)), True, True)

    layers = (LayerTable(0, 0, ((), rows(1), rows(2))),) * 4
    return Frame(("CPU", "CUDA0", "CUDA1"), layers, (100, cap_kib, 20), hidden_us=(6, 1), fixed_us=(100, 50))


@pytest.mark.parametrize(
    ("picks", "expected"),
    [
        ((0, 0, 0, 0), (104, 54)),
        ((0, 1, 0, 0), (107, 57)),
        ((1, 0, 0, 0), (113, 58)),
        ((0, 0, 0, 1), (113, 58)),
    ],
)
def test_hidden_boundary_by_hand(picks: tuple[int, ...], expected: tuple[int, int]) -> None:
    """Only the last layer of a card that another follows hides its boundary."""
    assert expected == times_us(crossing_frame(20), Answer((1, 1, 2, 2), picks))


def test_program_hides_a_boundary() -> None:
    """Where one layer of the first card has to go, the program sends the last and counts its boundary once."""
    placing = Placing(crossing_frame(10))
    result = placing.program.solve(10.0, 0.0, seed=1)
    assert result.objective == 107 + 57
    assert placing.answer(result.values) == Answer((1, 1, 2, 2), (0, 1, 0, 0))


@given(frame=frames(), data=st.data())
@settings(deadline=None, max_examples=300)
def test_excluded_answers_and_those_alike(frame: Frame, data: st.DataObject) -> None:
    """With some answers excluded the program finds the best that is alike to none of them, by brute force."""
    valid = [answer for answer in answers(frame) if is_valid(frame, answer)]
    if not valid:
        return
    out = data.draw(st.lists(st.sampled_from(valid), min_size=1, max_size=3))
    left = [sum(times_us(frame, a)) for a in valid if not any(is_alike(frame, a, b) for b in out)]
    placing = Placing(frame)
    for each in out:
        placing.exclude(each)
    placing.hint(out[0])
    result = placing.program.solve(10.0, 0.0, seed=1)
    if not left:
        assert result.status == "INFEASIBLE"
        return
    match = placing.answer(result.values)
    assert min(left) == result.objective == sum(times_us(frame, match))
    assert not any(is_alike(frame, match, each) for each in out)


@given(frame=frames(), most=st.integers(3, 40))
@settings(deadline=None, max_examples=100)
def test_prompt_limit(frame: Frame, most: int) -> None:
    """A limit on prompt time holds, and costs no more than it must."""
    frame = dataclasses.replace(frame, max_prompt_us=most)
    placing = Placing(frame)
    result = placing.program.solve(10.0, 0.0, seed=1)
    best = best_by_brute_force(frame, 1, 1)
    assert best == result.objective if best is not None else result.status == "INFEASIBLE"


@st.composite
def equal_cards(draw: st.DrawFn) -> Frame:
    """Frames of alike layers on three or four equal cards, the last of which may have less room."""
    n_cards = draw(st.integers(3, 4))
    decode, prompt, kib, away = draw(small), draw(small), draw(st.integers(1, 9)), draw(small)

    def row(p: int) -> tuple[GroupChoice, ...]:
        at_home = GroupChoice((p,), decode, prompt, ((p, kib),))
        return at_home, GroupChoice((0,), decode + away, prompt, ((0, kib), (p, 0)), True, True)

    table = LayerTable(0, 0, ((), *(row(p) for p in range(1, n_cards + 1))))
    cap = draw(st.integers(0, 20))
    return Frame(
        positions=tuple(map(str, range(n_cards + 1))),
        layers=(table,) * draw(st.integers(n_cards, 6)),
        cap_kib=(draw(st.integers(0, 40)), *[cap] * (n_cards - 1), draw(st.integers(0, 20))),
        hidden_us=draw(st.sampled_from([(3, 2), (0, 0)])),
        max_host_layers=draw(st.one_of(st.none(), st.integers(0, 3))),
    )


@given(frame=equal_cards())
@settings(deadline=None, max_examples=200)
def test_one_of_equal_answers_is_enough(frame: Frame) -> None:
    """Where equal cards are put in order the optimum is the same, and the first has no fewer layers."""
    placing = Placing(frame, has_symmetry=True)
    result = placing.program.solve(10.0, 0.0, seed=1)
    best = best_by_brute_force(frame, 1, 1)
    if best is None:
        assert result.status == "INFEASIBLE"
        return
    answer = placing.answer(result.values)
    counts = [answer.homes.count(p) for p in range(1, len(frame.positions) - 1)]
    assert best == result.objective == sum(times_us(frame, answer))
    assert counts == sorted(counts, reverse=True)
