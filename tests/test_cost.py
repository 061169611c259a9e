from __future__ import annotations

import dataclasses

import pytest
from solving_support import dense_model, expert_model, one_card, problem

from placement.inputs.coefficients import DEFAULTS
from placement.inputs.machine import Coefficient, Machine
from placement.inputs.problem import CPU, Assignment, Problem
from placement.predict.cost import GraphCounts, evaluate, pipelined_s

ROUND = {
    "read_efficiency": 1.0,
    "kv_read_efficiency": 0.5,
    "cpu_read_efficiency": 0.5,
    "split_us": 10.0,
    "node_us": 1.0,
    "token_us": 7.0,
    "pinned_link_efficiency": 0.8,
    "pageable_link_efficiency": 0.4,
    "dense_compute_efficiency": 0.5,
    "expert_compute_efficiency": 0.25,
    "attention_compute_efficiency": 0.5,
    "compute_half_tokens": 0.0,
}
COUNTS = GraphCounts(splits_prompt=2, splits_decode=2, n_nodes_prompt=110, n_nodes_decode=100)


def rounded(machine: Machine) -> Machine:
    """The machine with coefficients that are easy to work with by hand."""
    table = {name: Coefficient(value, DEFAULTS[name].unit) for name, value in ROUND.items()}
    return dataclasses.replace(machine, coefficients=table)


def dense() -> Problem:
    """Two dense layers on one card of 1e12 B/s and 1e14 flop/s; 1,000 + 200 tokens at depth 1,024."""
    return problem(dense_model(2), rounded(one_card(1000)))


def on_card(asked: Problem, *moved: tuple[str, str]) -> Assignment:
    """Everything on CUDA0 but what is moved."""
    n_layers = asked.model.get("block_count")
    return Assignment(("CUDA0",), ("CUDA0",) * (n_layers + 1), moved, asked.settings)


def test_decode_by_hand() -> None:
    """Weights of two layers and the output once, 1,280 cells of KV at half speed, splits, nodes, token."""
    layer = 2 * 1_114_112 + 2 * 278_528 + 2 * 4_096 + 3 * 4_456_448
    weights_us = (2 * layer + 4_456_448 + 4_096) / 1e6
    kv_us = 2 * 1_280 * 544 / 0.5e6
    expected = weights_us + kv_us + 2 * 10 + 100 * 1 + 7
    assert evaluate(dense(), on_card(dense()), COUNTS).decode_s * 1e6 == pytest.approx(expected)


def test_prompt_by_hand() -> None:
    """Two ubatches, 512 and 488: weights twice, the output once, matrix work, attention, splits, nodes."""
    layer = 2 * 1_114_112 + 2 * 278_528 + 2 * 4_096 + 3 * 4_456_448
    weights_us = (2 * 2 * layer + 4_456_448 + 2 * 4_096) / 1e6
    elements = 2 * 1024 * 1024 + 2 * 1024 * 256 + 3 * 1024 * 4096
    dense_us = 2 * 2 * elements * 1000 / 50e6
    attention_us = 2 * 8 * 2 * (128 + 128) * (512 * (1024 + 256) + 488 * (1024 + 512 + 244)) / 50e6
    expected = weights_us + dense_us + attention_us + 2 * 2 * 10 + 2 * 110 * 1
    assert evaluate(dense(), on_card(dense()), COUNTS).prompt_s * 1e6 == pytest.approx(expected)


def test_turn_adds_up() -> None:
    """A turn is its prompt and its tokens; speeds are their inverses."""
    speed = evaluate(dense(), on_card(dense()), COUNTS)
    assert speed.turn_s == speed.prompt_s + 200 * speed.decode_s
    assert (speed.decode_tps, speed.prompt_tps) == (1 / speed.decode_s, 1000 / speed.prompt_s)


def test_no_prompt_has_no_prompt_speed() -> None:
    """Without a prompt its speed is unknown, not 0 or infinite."""
    asked = problem(dense_model(2), one_card(1000), prompt_tokens=0)
    assert evaluate(asked, on_card(asked), COUNTS).prompt_tps is None


def test_experts_are_read_sparsely() -> None:
    """8 of 64 experts: moving a layer's stacks to the host adds an eighth of their bytes at the host's speed."""
    asked = problem(expert_model(1), rounded(one_card(1000)))
    names = [f"blk.0.ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
    moved = on_card(asked, *((name, CPU) for name in names))
    more_s = evaluate(asked, moved, COUNTS).decode_s - evaluate(asked, on_card(asked), COUNTS).decode_s
    used_bytes = 3 * 1024 * 512 * 64 * 34 / 32 / 8
    assert more_s == pytest.approx(used_bytes / 25e9 - used_bytes / 1e12)


@pytest.mark.parametrize(
    ("load_mode", "gb_per_s"), [("none", 20.0), ("auto", 10.0), ("mmap", 10.0), ("dio", 20.0)]
)
def test_host_weights_are_streamed(load_mode: str, gb_per_s: float) -> None:
    """A prompt streams host weights over the link once per ubatch; pinned memory is faster than mapped."""
    asked = problem(dense_model(1), rounded(one_card(1000)))
    name = "blk.0.ffn_down.weight"
    settings = dataclasses.replace(asked.settings, load_mode=load_mode)
    home, moved = (
        dataclasses.replace(on_card(asked, *pairs), settings=settings) for pairs in ((), ((name, CPU),))
    )
    more_s = evaluate(asked, moved, COUNTS).prompt_s - evaluate(asked, home, COUNTS).prompt_s
    assert more_s == pytest.approx(2 * 4_456_448 / (gb_per_s * 1e9))


@pytest.mark.parametrize("settings", [{"is_op_offloaded": False}, {}])
def test_where_nothing_streams(settings: dict[str, bool]) -> None:
    """Without operation offload, or with a prompt of less than 32 tokens, the CPU computes at its own rate."""
    n_tokens = 31 if not settings else 512
    asked = problem(dense_model(1), rounded(one_card(1000)), prompt_tokens=n_tokens)
    moved = on_card(asked, ("blk.0.ffn_down.weight", CPU))
    home, moved = (
        dataclasses.replace(each, settings=dataclasses.replace(each.settings, **settings))
        for each in (on_card(asked), moved)
    )
    more_s = evaluate(asked, moved, COUNTS).prompt_s - evaluate(asked, home, COUNTS).prompt_s
    flops, n_bytes = 2 * 1024 * 4096 * n_tokens, 4_456_448
    cpu_s = flops / (8 * 0.06e12) + n_bytes / 25e9
    assert more_s == pytest.approx(cpu_s - flops / 50e12 - n_bytes / 1e12)


@pytest.mark.parametrize(
    ("n_ubatches", "n_copies", "expected"), [(1, 4, 6.0), (4, 1, 6.0), (4, 4, 4.875), (1000, 4, 4.5015)]
)
def test_pipelined(n_ubatches: int, n_copies: int, expected: float) -> None:
    """Stages of 1, 2 and 3 s: in the middle between their sum and the ideal (sum + (n - 1)·longest)/n."""
    assert pipelined_s([1.0, 2.0, 3.0], n_ubatches, n_copies, 0.5) == pytest.approx(expected)


def test_layer_on_the_cpu_reads_its_cache_there() -> None:
    """A layer that lives on the CPU reads its KV cache at the host's speed, and so does -nkvo."""
    asked = dense()
    at_home = Assignment(("CUDA0",), ("CPU", "CUDA0", "CUDA0"), (), asked.settings)
    off = dataclasses.replace(
        on_card(asked), settings=dataclasses.replace(asked.settings, is_kv_offloaded=False)
    )
    base = evaluate(asked, on_card(asked), COUNTS).decode_s
    layer, kv = 2 * 1_114_112 + 2 * 278_528 + 2 * 4_096 + 3 * 4_456_448, 1_280 * 544
    weights_s, kv_s = layer / 25e9 - layer / 1e12, kv / 25e9 - kv / 0.5e12
    assert evaluate(asked, at_home, COUNTS).decode_s - base == pytest.approx(weights_s + kv_s)
    assert evaluate(asked, off, COUNTS).decode_s - base == pytest.approx(2 * kv_s)
