from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from solving_support import card, expert_model, one_card, two_cards

from placement.errors import InputError
from placement.inputs.machine import Machine, backend_of
from placement.inputs.model_files.files import resolve_model
from placement.inputs.problem import Assignment, Problem, Settings, Workload
from placement.llamacpp.arguments import parse
from placement.llamacpp.compute import plan_compute
from placement.llamacpp.emit.resolve import resolve
from placement.llamacpp.memory import startable, static_memory
from placement.predict.check import check_arguments, check_row, default_workload, device_use
from placement.predict.solution import PlannedPlacement, Solution
from placement.solve.run import our_choice
from placement.units import MIB

MODEL = expert_model(4)
ON_CARD = "-c 4096 -ngl 99 -ctk q8_0 -ctv q8_0 -fa on -fit off -np 1"


def run(text: str = ON_CARD, machine: Machine | None = None, **asked: object):  # type: ignore[no-untyped-def]
    """The check of these arguments on a card with room for all."""
    return check_arguments(MODEL, machine or one_card(4000), parse(text), **asked)  # type: ignore[arg-type]


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


def choice_beside(text: str) -> Solution:
    """What place itself chooses for the problem of these arguments."""
    settings = resolve(MODEL, one_card(4000), parse(text)).settings
    result = our_choice(Problem(MODEL, one_card(4000), settings, Workload(1000, 200, 1024)))
    assert result is not None
    return result


def test_choice_keeps_both_cache_types() -> None:
    """Beside K q8_0 and V f16 stands a choice of just these, not one of less memory."""
    settings = choice_beside("-c 4096 -np 1 -ctk q8_0 -ctv f16 -fa on").assignment.settings
    assert (settings.kv_type_k, settings.kv_type_v) == ("q8_0", "f16")


@pytest.mark.parametrize(
    ("text", "field", "kept"),
    [
        ("-ctk f16 -ctv f16 -fa off", "flash_attention", "off"),
        ("-ctk f16 -ctv f16", "flash_attention", "on"),  # auto is no choice of the user's
        ("-ctk q8_0 -ctv q8_0 -fa off", "flash_attention", "on"),  # the engine would not start without
        ("--swa-full", "is_swa_full", True),
        ("-nkvo", "is_kv_offloaded", False),
        ("-kvu -np 2", "is_kv_unified", True),
    ],
)
def test_choice_keeps_what_the_cache_is_made_of(text: str, field: str, kept: object) -> None:
    """What decides the context's memory is as checked, and the engine starts with it."""
    settings = choice_beside(f"-c 4096 -np 1 {text}").assignment.settings
    assert getattr(settings, field) == kept


def test_choice_has_the_checked_context_memory() -> None:
    """A mixed cache without flash attention takes as much in the choice as in what was checked."""
    text = "-c 4096 -ngl 99 -np 1 -ctk q8_0 -ctv f16 -fa off"
    checked, picked = run(text).devices, choice_beside(text).devices
    assert sum(use.context_mib for use in picked.values()) == sum(use.context_mib for use in checked.values())


def test_choice_of_one_cache_has_one_type() -> None:
    """Latent attention has one cache: the engine starts only with K's type for both."""
    settings = Settings(kv_type_k="q8_0", kv_type_v="f16", flash_attention="on")
    assert startable(resolve_model("glm-flash"), settings) == dataclasses.replace(settings, kv_type_v="q8_0")


def test_no_choice_where_no_placement_starts() -> None:
    """Blocks of 256 do not divide heads of 128: nothing stands beside the check."""
    assert startable(MODEL, Settings(kv_type_k="q4_K", kv_type_v="f16", flash_attention="on")) is None


@pytest.mark.parametrize("name", ["Vulkan0", "ROCm0", "MTL0", "SYCL0", "MUSA0", "CANN0", "OpenCL0", "BLAS"])
def test_backend_that_is_not_mirrored_is_said(name: str) -> None:
    """A check on a backend whose rules are not ours is not exact, and one note names device and backend."""
    row = check_row(run(machine=Machine("other", (card(name, 4000),), one_card(1).cpu)))
    backend = backend_of(name)
    assert not row["is_exact"]
    assert [
        f"{name}: llama.cpp's {backend} backend is not mirrored here" in note for note in row["notes"]
    ] == [True]


@pytest.mark.parametrize("name", ["CUDA0", "RPC0"])
def test_mirrored_backend_needs_no_note(name: str) -> None:
    """CUDA, and RPC whatever is behind it, are mirrored."""
    device = card(name, 4000, address="10.0.0.2:50052" if name == "RPC0" else None)
    arguments = ON_CARD + (" --rpc 10.0.0.2:50052" if name == "RPC0" else "")
    result = run(arguments, Machine("mirrored", (device,), one_card(1).cpu))
    assert (result.is_exact, result.notes) == (True, ())


def test_card_that_takes_no_part_needs_no_note() -> None:
    """What is not given to the model has no say in its memory."""
    machine = Machine("both", (card("CUDA0", 4000), card("Vulkan0", 4000)), one_card(1).cpu)
    assert run(ON_CARD + " -dev CUDA0", machine).is_exact
    assert not run(ON_CARD, machine).is_exact


def test_devices_of_a_backend_share_a_note() -> None:
    """Two cards of one backend are one line."""
    machine = Machine("two", (card("Vulkan0", 4000), card("Vulkan1", 4000)), one_card(1).cpu)
    assert [note.partition(":")[0] for note in run(machine=machine).notes] == ["Vulkan0, Vulkan1"]


def test_planned_on_an_unmirrored_backend_is_the_engines_word() -> None:
    """What the engine itself planned is exact, and no note says that it is an estimate."""
    machine = Machine("other", (card("Vulkan0", 4000),), one_card(1).cpu)

    def engine_planner(asked: Problem, assignments: list[Assignment]) -> list[PlannedPlacement]:
        (only,) = assignments
        plan = plan_compute(asked.model, asked.machine, only, asked.program)
        return [PlannedPlacement(plan, device_use(asked, only, plan))]

    result = run(machine=machine, engine_planner=engine_planner)
    assert (result.label, result.is_exact, result.notes) == ("planned", True, ())
