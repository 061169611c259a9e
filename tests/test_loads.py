from __future__ import annotations

import dataclasses
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st
from solving_support import dense_model, one_card, problem

from placement.inputs.problem import Settings, Workload
from placement.predict.loads import QUANTITIES, Load, Work, total, ubatch_sizes


@pytest.mark.parametrize(
    ("prompt", "batch", "ubatch", "expected"),
    [
        (1000, 2048, 512, [512, 488]),
        (3000, 2048, 1024, [1024, 1024, 952]),
        (2049, 2048, 2048, [2048, 1]),
        (0, 8, 8, []),
    ],
)
def test_ubatches(prompt: int, batch: int, ubatch: int, expected: list[int]) -> None:
    """Batches are cut first, then each into ubatches."""
    assert expected == ubatch_sizes(Workload(prompt), Settings(), batch, ubatch)


@given(st.integers(1, 5000), st.integers(1, 4096), st.integers(1, 4096))
def test_ubatches_hold_the_prompt(prompt: int, batch: int, ubatch: int) -> None:
    """Every token is in one ubatch, and none is larger than allowed."""
    sizes = ubatch_sizes(Workload(prompt), Settings(), batch, ubatch)
    assert sum(sizes) == prompt
    assert max(sizes) <= min(batch, ubatch)


def test_window_limits_attention() -> None:
    """A layer with a window attends to no more than it."""
    asked = problem(dense_model(2), one_card(1000))
    work = Work(asked, asked.settings)
    narrow = dataclasses.replace(work.architecture.layers[0], window_tokens=128)
    heads = 8 * 2 * (128 + 128)
    assert heads * 1000 * 128 == work.context(narrow).attention_flops


def test_the_total_is_of_each_quantity() -> None:
    """Loads add up quantity by quantity; of none there is nothing."""
    one, two = (Load(*range(n, n + len(fields(Load)))) for n in (1, 10))
    assert tuple(2 * i + 11 for i in range(len(QUANTITIES))) == total([one, two]).amounts
    assert Load() == total([])
