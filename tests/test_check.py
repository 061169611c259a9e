from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from solving_support import expert_model, one_card, two_cards

from placement.arguments import parse
from placement.check import check, check_row, default_workload, device_use
from placement.compute import plan_compute
from placement.errors import InputError
from placement.machine import Machine
from placement.memory import static_memory
from placement.problem import Workload
from placement.units import MIB

MODEL = expert_model(4)
ON_CARD = "-c 4096 -ngl 99 -ctk q8_0 -ctv q8_0 -fa on -fit off -np 1"


def run(text: str = ON_CARD, machine: Machine | None = None, **asked: object):  # type: ignore[no-untyped-def]
    """The check of these arguments on a card with room for all."""
    return check(MODEL, machine or one_card(4000), parse(text), **asked)  # type: ignore[arg-type]


def test_memory_is_the_three_parts() -> None:
    """Weights and context are the assignment's bytes, compute buffers the plan's."""
    result = run()
    memory = static_memory(MODEL, one_card(4000), result.assignment)
    plan = plan_compute(MODEL, one_card(4000), result.assignment, "llama-server")
    use = result.devices["CUDA0"]
    assert use.weights_mib * MIB == memory["CUDA0"].weights_bytes
    assert use.context_mib * MIB == memory["CUDA0"].context_bytes
    assert use.compute_mib * MIB == plan.compute_bytes["CUDA0"]


def test_headroom_by_hand() -> None:
    """Headroom is the cap less runtime and the engine's own figure."""
    machine = one_card(4000)
    machine = dataclasses.replace(
        machine, devices=(dataclasses.replace(machine.devices[0], runtime_mib=480.0),)
    )
    use = run(machine=machine, reserve_mib=100.0).devices["CUDA0"]
    assert use.cap_mib == 3900.0
    assert use.headroom_mib == 3900.0 - 480.0 - use.weights_mib - use.context_mib - use.compute_mib


def test_fits_needs_every_device() -> None:
    """One card over its cap, or the host over its own, and it does not fit."""
    assert run().fits
    assert not run(machine=one_card(300)).fits
    assert not run(machine=one_card(4000, host_mib=1)).fits


def test_unused_card_is_charged_nothing() -> None:
    """A card that the arguments leave out does not appear."""
    result = run(ON_CARD + " -dev CUDA0", two_cards(4000, 4000))
    assert list(result.devices) == ["CUDA0", "Host"]


def test_moved_experts_are_on_the_host() -> None:
    """Experts moved by an override leave their card and cost two splits a layer."""
    result, plain = run(ON_CARD + " -ot exps=CPU"), run()
    stacks_mib = sum(tensor.n_bytes for tensor in MODEL.tensors if "_exps." in tensor.name) / MIB
    moved_mib = plain.devices["CUDA0"].weights_mib - result.devices["CUDA0"].weights_mib
    assert moved_mib == pytest.approx(stacks_mib)
    assert result.splits_decode == plain.splits_decode + 2 * 4
    assert result.speed.decode_tps < plain.speed.decode_tps


def test_unknown_arguments_are_kept() -> None:
    """What is not about placement is handed back as it was."""
    assert run(ON_CARD + " --jinja --temp 1.0").unknown_arguments == (("--jinja",), ("--temp", "1.0"))


def test_refused_argument() -> None:
    """What the engine would refuse is an input error."""
    with pytest.raises(InputError):
        run("-ot exps=CUDA5")


def test_row_has_the_contract() -> None:
    """The row has the contract's keys, rounded, and the cap that the three parts share."""
    row = check_row(run())
    contract = ("model", "machine", "label", "devices", "splits", "speed", "fits", "advice")
    assert [key for key in contract if key not in row] == []
    use = row["devices"]["CUDA0"]
    assert use["weights_mib"] + use["context_mib"] + use["compute_mib"] <= use["cap_mib"] == 4000.0


def test_row_of_no_prompt() -> None:
    """A turn without a prompt has no prompt speed, and says null."""
    assert check_row(run(workload=Workload(0, 10, 0)))["speed"]["prompt_tps"] is None


@given(st.integers(1, 10**6), st.integers(1, 10**5), st.integers(1, 10**5))
def test_default_turn_fits_its_context(ctx: int, prompt: int, generate: int) -> None:
    """A turn begins at a quarter of the context and ends within it, where there is room for two tokens."""
    turn = default_workload(MODEL, ctx, prompt, generate)
    assert turn.depth_tokens == ctx // 4
    assert turn.prompt_tokens >= 1
    assert turn.generate_tokens >= 1
    if ctx >= 4:
        assert turn.depth_tokens + turn.prompt_tokens + turn.generate_tokens <= ctx


def test_ample_context_leaves_the_turn_alone() -> None:
    """2,000 and 500 tokens at a quarter of 131,072."""
    assert default_workload(MODEL, 131072) == Workload(2000, 500, 32768)


def test_host_without_gpu() -> None:
    """Without GPUs only the host is used."""
    machine = Machine("host", (), one_card(1).cpu)
    result = run("-c 4096", machine)
    assert list(result.devices) == ["Host"]
    assert result.devices["Host"].weights_mib == pytest.approx(MODEL.n_bytes / MIB, rel=1e-3)


def test_device_use_is_what_check_shows() -> None:
    """The memory of an assignment does not depend on who asks."""
    from solving_support import problem

    result = run()
    plan = plan_compute(MODEL, one_card(4000), result.assignment, "llama-server")
    asked = problem(MODEL, one_card(4000))
    assert device_use(asked, result.assignment, plan) == result.devices
