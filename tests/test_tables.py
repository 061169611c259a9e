"""Frames against what they stand for: `evaluate` and `static_memory` of the assignment of any answer."""

from __future__ import annotations

import dataclasses
from random import Random

import golden_sample
import pytest
from solving_support import (
    card,
    configuration,
    dense_model,
    expert_model,
    problem,
    random_answer,
    table_of,
    two_cards,
)

from placement.inputs.machine import Machine
from placement.inputs.machine_files import REFERENCE_MACHINE, resolve_machine
from placement.inputs.problem import CPU, Problem
from placement.llamacpp.compute import plan_compute
from placement.llamacpp.memory import static_memory
from placement.predict.cost import GraphCounts, evaluate, graph_counts
from placement.predict.terms import coefficient
from placement.solve.cpsat.frame import Answer, times_us, used_kib
from placement.solve.frames.pieces import Pieces, Pins
from placement.solve.frames.tables import ComputeTable, Table, TableBuilder, host_pattern
from placement.solve.request import Request
from placement.solve.search.configurations import SearchSpace
from placement.solve.search.search import Search
from placement.solve.solve import make_problem
from placement.units import KIB

TWO = two_cards(4000, 3000)
THREE = dataclasses.replace(TWO, devices=(*TWO.devices, card("CUDA2", 2000)))
NO_BUFFERS = ComputeTable((0, 0, 0, 0), GraphCounts(3, 3, 100, 100))


def shipped(name: str) -> Problem:
    """The question that `place solve NAME` asks on the reference machine."""
    model, machine = golden_sample.model(name), resolve_machine(REFERENCE_MACHINE)
    return make_problem(model, machine, Request())[0]


PROBLEMS = {
    "experts on two cards": problem(expert_model(6), TWO),
    "experts on three cards": problem(expert_model(9), THREE),
    "dense on two cards": problem(dense_model(6), TWO),
    "qwen3-coder-q5": shipped("qwen3-coder-q5"),
    "gpt-oss-120b": shipped("gpt-oss-120b"),
    "glm-flash": shipped("glm-flash"),
    "llama-3.3-70b-q4": shipped("llama-3.3-70b-q4"),
}


def differences(
    asked: Problem, table: Table, answer: Answer, assumed: GraphCounts
) -> tuple[float, float, float, float]:
    """The frame's time minus `evaluate`'s, decode and prompt: whole splits, and microseconds beside them."""
    assignment = table.assignment(answer)
    plan = plan_compute(asked.model, asked.machine, assignment, asked.program)
    counts = graph_counts(plan)
    counts = dataclasses.replace(
        counts, n_nodes_decode=assumed.n_nodes_decode, n_nodes_prompt=assumed.n_nodes_prompt
    )
    speed = evaluate(asked, assignment, counts)
    decode_us, prompt_us = times_us(table.frame, answer)
    split_us = coefficient(asked.machine, "split_us")
    n_ubatches = -(-asked.workload.prompt_tokens // table.configuration.settings.ubatch_tokens)
    more = decode_us - speed.decode_s * speed.generate_tokens * 1e6, prompt_us - speed.prompt_s * 1e6
    units = split_us * asked.workload.generate_tokens, split_us * n_ubatches
    splits = [round(us / unit) for us, unit in zip(more, units, strict=True)]
    rest = [us - n * unit for us, n, unit in zip(more, splits, units, strict=True)]
    return splits[0], splits[1], rest[0], rest[1]


@pytest.mark.parametrize("name", PROBLEMS)
def test_times_of_random_answers(name: str) -> None:
    """Whatever the answer, the frame's time is `evaluate`'s to the rounding of each layer, splits aside."""
    asked = PROBLEMS[name]
    names = tuple(device.name for device in asked.machine.devices)
    table, random = table_of(asked, configuration(asked, *names)), Random(7)
    assumed = Search(asked).buffers.exact(table.configuration).counts
    n_layers = len(table.frame.layers)
    for _ in range(4):
        answer = random_answer(table.frame, random)
        *splits, decode_us, prompt_us = differences(asked, table, answer, assumed)
        assert max(abs(decode_us), abs(prompt_us)) <= 2 * n_layers
        n_cpu = answer.homes.count(0)
        assert -2 * n_cpu <= splits[0] <= 2 * len(names)
        assert -n_cpu - 2 <= splits[1] <= n_cpu + 3 * len(names)


@pytest.mark.parametrize("name", PROBLEMS)
def test_memory_of_random_answers(name: str) -> None:
    """What a frame leaves free at each position is what the assignment leaves, less 2 KiB a layer at most."""
    asked = PROBLEMS[name]
    names = tuple(device.name for device in asked.machine.devices)
    frame_configuration, random = configuration(asked, *names), Random(3)
    empty = dataclasses.replace(NO_BUFFERS, n_bytes=(0,) * (len(names) + 1))
    table = TableBuilder(Pieces(asked), frame_configuration).build(empty)
    for _ in range(10):
        answer = random_answer(table.frame, random)
        memory = static_memory(asked.model, asked.machine, table.assignment(answer))
        used = used_kib(table.frame, answer)
        for name_, cap, kib in zip(table.frame.positions, table.frame.cap_kib, used, strict=True):
            at = memory["Host" if name_ == CPU else name_]
            free_kib = usable_mib(asked.machine, name_) * KIB - (at.weights_bytes + at.context_bytes) / KIB
            assert 0 <= free_kib - (cap - kib) <= 2 * len(table.frame.layers)


def usable_mib(machine: Machine, position: str) -> float:
    """What the engine's own figures may reach there."""
    if position == CPU:
        return machine.cpu.usable_mib
    return machine.device(position).usable_mib - machine.device(position).runtime_mib


@pytest.mark.parametrize("name", ["gpt-oss-120b", "qwen3-coder-q5"])
def test_times_of_good_answers(name: str) -> None:
    """The answers that a search starts from have the splits that they were charged for, but one a ubatch."""
    asked = PROBLEMS[name]
    search, space = Search(asked), SearchSpace(ubatches=(512, 2048), load_modes=("none",))
    subproblems = [
        search.subproblem(lower_bound.configuration, space) for lower_bound in search.lower_bounds(space)
    ]
    assert len([subproblem for subproblem in subproblems if subproblem]) >= 8
    for subproblem in filter(None, subproblems[:12]):
        answer = subproblem.relaxation.answer()
        if answer is None:
            continue
        *splits, decode_us, prompt_us = differences(
            asked, subproblem.table, answer, subproblem.compute.counts
        )
        assert splits[0] == 0
        assert abs(splits[1]) <= 1
        assert max(abs(decode_us), abs(prompt_us)) <= len(subproblem.table.frame.layers)


@pytest.mark.parametrize("ubatch_tokens", [256, 512])
def test_times_of_pipelines(ubatch_tokens: int) -> None:
    """With several ubatches in flight, prompt times agree within a thousandth of the longest stage."""
    asked = problem(expert_model(6), TWO, prompt_tokens=2000)
    table = table_of(
        asked,
        configuration(
            asked, "CUDA0", "CUDA1", is_pipelined=True, uses_host=False, ubatch_tokens=ubatch_tokens
        ),
    )
    for n_first in (1, 3, 5):
        answer = Answer((1,) * n_first + (2,) * (7 - n_first), (0,) * 7)
        assignment = table.assignment(answer)
        plan = plan_compute(asked.model, asked.machine, assignment, asked.program)
        assert plan.n_copies == 4
        speed = evaluate(asked, assignment, graph_counts(plan))
        assert times_us(table.frame, answer)[1] == pytest.approx(speed.prompt_s * 1e6, rel=0.001)


def test_pipeline_has_no_overrides() -> None:
    """A pipelined configuration moves nothing: one override would end it."""
    asked = PROBLEMS["experts on two cards"]
    table = table_of(asked, configuration(asked, "CUDA0", "CUDA1", is_pipelined=True, uses_host=False))
    assert {len(choices) for layer in table.frame.layers for choices in layer.choices} == {0, 1}
    assert not table.assignment(Answer((1,) * 3 + (2,) * 4, (0,) * 7)).settings.has_overrides


def test_two_cards_without_moves_have_one_override() -> None:
    """All on two cards and not pipelined: an override that changes nothing ends the fourfold buffers."""
    asked = PROBLEMS["experts on two cards"]
    table = table_of(asked, configuration(asked, "CUDA0", "CUDA1", uses_host=False))
    assert table.assignment(Answer((1,) * 3 + (2,) * 4, (0,) * 7)).settings.has_overrides


def test_layers_alike_are_of_one_kind() -> None:
    """Layers of the same tensors and cache share a kind, but for the first three, whose buffers differ."""
    pieces = Pieces(PROBLEMS["experts on two cards"])
    assert len(set(pieces.kinds[:3])) == 1
    assert len(set(pieces.kinds[3:6])) == 1
    assert len(set(pieces.kinds)) == 3


def test_layers_of_equal_groups_share_their_moves() -> None:
    """Attention layers and recurrent layers of one model differ in kind, not in what moving experts adds."""
    pieces = Pieces(PROBLEMS["qwen3-coder-q5"])
    kinds = set(pieces.kinds[3:-1])
    assert len(kinds) > len({pieces.moves[kind] for kind in kinds})


@pytest.mark.parametrize("name", PROBLEMS)
def test_equal_moves_have_equal_differences(name: str) -> None:
    """What a choice adds to the layer all at home is the same for all layers of the same moves."""
    asked = PROBLEMS[name]
    frame = table_of(asked, configuration(asked, "CUDA0", "CUDA1")).frame
    seen: dict[tuple[int, int, int], tuple[object, ...]] = {}
    for layer in frame.layers:
        for home, row in enumerate(layer.choices):
            for pick, choice in enumerate(row):
                base = row[0]
                kib = dict(choice.kib)
                for position, each in base.kib:
                    kib[position] = kib.get(position, 0) - each
                added = (
                    choice.decode_us - base.decode_us,
                    choice.prompt_us - base.prompt_us,
                    {position: each for position, each in kib.items() if each},
                    choice.is_host,
                    choice.hides_boundary,
                )
                assert seen.setdefault((layer.moves, home, pick), added) == added


def choices_of(asked: Problem, layer: int, home: int, pins: Pins) -> set[tuple[int, ...]]:
    """Where the groups of a layer may go."""
    frame_configuration = configuration(asked, "CUDA0", "CUDA1")
    frame = TableBuilder(Pieces(asked, pins), frame_configuration).build(NO_BUFFERS).frame
    return {choice.groups for choice in frame.layers[layer].choices[home]}


def test_choices_of_a_layer() -> None:
    """Both groups at home, both on one other position, or one of them there."""
    found = choices_of(PROBLEMS["experts on two cards"], 4, 1, Pins())
    assert found == {(1, 1), (0, 0), (0, 1), (1, 0), (2, 2), (2, 1), (1, 2)}


def test_pinned_group() -> None:
    """A pinned group is where it is pinned, in this layer alone."""
    asked, pins = PROBLEMS["experts on two cards"], Pins(groups=((4, "down", "CPU"),))
    assert choices_of(asked, 4, 1, pins) == {(0, 0), (1, 0)}
    assert (1, 1) in choices_of(asked, 5, 1, pins)


def test_pinned_home() -> None:
    """A pinned layer has no choices elsewhere."""
    asked, pins = PROBLEMS["experts on two cards"], Pins(homes=((4, frozenset({"CUDA1"})),))
    assert choices_of(asked, 4, 1, pins) == set()
    assert (2, 2) in choices_of(asked, 4, 2, pins)


@pytest.mark.parametrize(
    ("home", "is_early", "groups", "expected"),
    [
        (1, False, (1, 1), None),
        (1, False, (0, 0), None),
        (0, True, (0, 0), None),
        (1, False, (0, 1), (1, False, (True, False))),
        (2, True, (0, 0), (2, True, (True, True))),
        (2, False, (1, 0), (2, False, (False, True))),
    ],
)
def test_host_pattern(home: int, is_early: bool, groups: tuple[int, ...], expected: object) -> None:
    """A pattern needs host groups on a GPU's layer: some but not all, or a layer among the first."""
    assert expected == host_pattern(home, is_early, groups)


def test_reserve_lowers_every_card() -> None:
    """A reserve is taken off each GPU's cap, a fraction of its total off too; the host keeps its own."""
    asked = dataclasses.replace(PROBLEMS["experts on two cards"], reserve_mib=100.0)
    plain, reserved = (
        TableBuilder(Pieces(each), configuration(asked, "CUDA0", "CUDA1"))
        .build(NO_BUFFERS, fraction)
        .frame.cap_kib
        for each, fraction in ((PROBLEMS["experts on two cards"], 0.0), (asked, 0.05))
    )
    less_mib = [(a - b) / KIB for a, b in zip(plain, reserved, strict=True)]
    assert less_mib == [0, 100 + 0.05 * 4000, 100 + 0.05 * 3000]


def hides(name: str) -> bool:
    """Whether a layer in the model's middle ends on the host when all its experts are there."""
    asked = PROBLEMS[name]
    frame = table_of(asked, configuration(asked, "CUDA0", "CUDA1")).frame
    return any(choice.hides_boundary for choice in frame.layers[5].choices[1])


def test_shared_expert_ends_at_home() -> None:
    """A layer with a shared expert comes back from the host, so its boundary costs a split of its own."""
    assert (hides("qwen3-coder-q5"), hides("glm-flash"), hides("gpt-oss-120b")) == (False, False, True)
