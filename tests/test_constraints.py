"""What the user fixes stays, and what cannot hold together is named."""

from __future__ import annotations

from typing import Any

import pytest
from solving_support import dense_model, expert_model, two_cards

from placement.errors import InputError
from placement.predict.solution import Solution, SolutionSet
from placement.solve.constraints import Constraint, pin_constraint, smallest_conflict, ts_constraint
from placement.solve.request import Request
from placement.solve.solve import solve_request

MODEL = expert_model()
MACHINE = two_cards(500.0, 400.0)


def solved(**constraints: Any) -> SolutionSet:
    return solve_request(MODEL, MACHINE, Request(**constraints))


def devices_of(solution: Solution, *parts: str) -> set[str]:
    """Where the tensors live whose names have one of these parts."""
    moved = dict(solution.assignment.moved)
    homes = solution.assignment.homes
    names = [tensor.name for tensor in MODEL.tensors if any(part in tensor.name for part in parts)]
    return {moved.get(name, homes[int(name.split(".")[1])]) for name in names}


def test_machine_is_too_small_for_all_experts() -> None:
    """The tests' model needs host memory on their machine: otherwise the constraints below would bind nothing."""
    assert solved().solutions[0].n_host_layers() > 0


@pytest.mark.parametrize("device", ["CUDA0", "CUDA1"])
def test_pinned_layer_stays_whole(device: str) -> None:
    """A pin of a whole layer keeps attention and experts of it on that card, in every solution."""
    for solution in solved(pins=(rf"blk\.3\..*={device}",)).solutions:
        assert {device} == devices_of(solution, "blk.3.")


def test_pinned_experts_leave_the_rest_free() -> None:
    """A pin of experts to the CPU moves those experts; the layer itself may live on a card."""
    best = solved(pins=(r"blk\.[01]\.ffn_.*_exps=CPU",)).solutions[0]
    assert {"CPU"} == devices_of(best, "blk.0.ffn_gate_exps", "blk.1.ffn_down_exps")
    assert "CPU" not in devices_of(best, "blk.0.attn_q.")


def test_layer_counts_stay() -> None:
    """`--ts 6,3` gives the first card six layers and the second two and the output."""
    best = solved(tensor_split=(6, 3)).solutions[0]
    assert (6, 3) == tuple(best.assignment.homes.count(name) for name in ("CUDA0", "CUDA1"))


def test_first_layers_stay_on_the_cpu() -> None:
    """`--ngl 5` leaves four of eight layers to the CPU: the output counts as a layer."""
    best = solved(n_gpu_layers=5).solutions[0]
    assert 4 == best.assignment.homes.count("CPU")


def test_devices_keep_their_order() -> None:
    """`--devices CUDA1,CUDA0` uses both cards, the slower one first."""
    for solution in solved(devices=("CUDA1", "CUDA0")).solutions:
        assert ("CUDA1", "CUDA0") == solution.assignment.devices


def test_no_device_is_the_cpu_alone() -> None:
    """`--devices none` puts every layer on the CPU."""
    best = solved(devices=("none",)).solutions[0]
    assert {"CPU"} == set(best.assignment.homes)


def test_cpu_layers_are_limited() -> None:
    """No solution keeps more layers on the CPU than asked for."""
    free = solved().solutions[0].n_host_layers()
    for solution in solved(max_cpu_layers=free).solutions:
        assert solution.n_host_layers() <= free


def test_kept_arguments_stay() -> None:
    """Placement arguments to keep act as the engine reads them: first match wins, the rest is solved."""
    found = solved(keep=r"-ot blk\.2\.ffn_.*_exps=CPU,blk\.[12]\.ffn_.*_exps=CUDA0 -ub 256 --jinja")
    best = found.solutions[0]
    assert ("--jinja",) == found.extra_args
    assert {"CPU"} == devices_of(best, "blk.2.ffn_up_exps")
    assert {"CUDA0"} == devices_of(best, "blk.1.ffn_up_exps")
    assert 256 == best.assignment.settings.ubatch_tokens


def test_contradiction_names_only_the_constraints_that_conflict() -> None:
    """A pin to a card and a layer that -ngl leaves to the CPU conflict; the third constraint is not blamed."""
    result = solved(max_cpu_layers=8, pins=(r"blk\.0\..*=CUDA0",), n_gpu_layers=5)
    assert ((), "INFEASIBLE") == (result.solutions, result.status)
    assert "--pin" in result.message
    assert "--ngl 5" in result.message
    assert "--max-cpu-layers" not in result.message


def test_one_group_cannot_be_on_two_devices() -> None:
    """Two pins of one expert group to different cards conflict."""
    pins = tuple(rf"blk\.4\.ffn_down_exps={name}" for name in ("CUDA0", "CUDA1"))
    message = solved(pins=pins).message
    assert all(repr(pin) in message for pin in pins)


def test_smallest_conflict_is_minimal() -> None:
    """Of five constraints of which the second and fourth exclude each other, just those two are told."""
    constraints = [Constraint(str(i), lambda space: space) for i in range(5)]

    def is_possible(kept: object) -> bool:
        return not {"1", "3"} <= {constraint.text for constraint in kept}  # type: ignore[attr-defined]

    assert ["1", "3"] == [constraint.text for constraint in smallest_conflict(constraints, is_possible)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("blk.0", "must be REGEX=DEVICE"),
        ("blk.0=CUDA7", "buffer type"),
        ("nothing_like_this=CUDA0", "matches no tensor"),
        ("token_embd=CUDA0", "keeps on the CPU"),
        ("blk(=CUDA0", "blk("),
    ],
)
def test_bad_pin_is_one_clear_line(text: str, words: str) -> None:
    """A pin without a device, with an unknown one, a bad pattern or no match says so."""
    with pytest.raises(InputError) as caught:
        pin_constraint(MODEL, MACHINE, text)
    assert words in str(caught.value)


def test_too_many_shares_are_refused() -> None:
    """`--ts` with more numbers than cards is an error."""
    with pytest.raises(InputError, match="at most 2"):
        ts_constraint(MODEL, MACHINE, (1, 2, 3), None, None)


def test_dense_layers_can_be_pinned() -> None:
    """A dense layer pinned to the second card lives there."""
    model, machine = dense_model(), two_cards(4000.0, 4000.0)
    best = solve_request(model, machine, Request(pins=(r"blk\.7\.=CUDA1",))).solutions[0]
    assert "CUDA1" == best.assignment.homes[7]
