"""The user's own llama.cpp as the planner of what is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from solving_support import expert_model, two_cards

from placement.cli import options
from placement.engine.cache import PlanCache
from placement.engine.find import Engine
from placement.engine.plan import plan
from placement.engine.rpc import RpcWorker, rpc_workers
from placement.errors import EngineMissing, InputError
from placement.inputs.machine import Cpu, Device, Machine
from placement.inputs.model_files.files import resolve_model
from placement.inputs.problem import Assignment, Problem
from placement.llamacpp.compute import plan_compute
from placement.llamacpp.graph.rows import ROWS
from placement.predict.solution import PlannedPlacement
from placement.solve.engine_planner import choose_engine, make_engine_planner, with_rpc_devices
from placement.solve.request import Request
from placement.solve.solve import solve_request
from placement.units import MIB


@pytest.fixture(scope="module")
def workers(engine: Engine) -> Iterator[tuple[RpcWorker, ...]]:
    """Two local workers, ended with the module."""
    with rpc_workers(engine, 2) as running:
        yield running


def cluster(workers: tuple[RpcWorker, ...], usable_mib: float) -> Machine:
    devices = tuple(
        Device(f"RPC{i}", usable_mib, usable_mib, 0.0, 50.0, 10.0, "CPU", address=worker.endpoint)
        for i, worker in enumerate(workers)
    )
    return Machine("two-workers", devices, Cpu(200_000, 50, 2))


@pytest.mark.engine
def test_every_solution_is_the_engines_own_plan(
    engine: Engine, workers: tuple[RpcWorker, ...], tmp_path: Path
) -> None:
    """Solutions shown with an engine carry its figures, fit its caps, and plan the same when asked again."""
    model, machine = resolve_model("qwen3-30b-a3b-q4"), cluster(workers, 7000.0)
    found = solve_request(
        model, machine, Request(ctx_tokens=16384), make_engine_planner(engine, machine, "llama-server")
    )
    assert found.solutions
    for solution in found.solutions:
        again = plan(engine, model, solution.args, program="llama-server", cache=PlanCache(engine, tmp_path))
        assert solution.label == "planned"
        assert (solution.splits_prompt, solution.splits_decode) == (again.splits_prompt, again.splits_decode)
        for name in solution.assignment.devices:
            use, row = solution.devices[name], again.devices[name]
            assert (use.weights_mib, use.context_mib, use.compute_mib) == (
                row.weights_mib, row.context_mib, row.compute_mib,
            )  # fmt: skip
            assert row.total_mib <= 7000.0
        assert solution.differences == ()


@pytest.mark.engine
def test_graph_without_a_rule_is_planned_by_probes(
    engine: Engine, workers: tuple[RpcWorker, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An architecture whose graph nobody has described is solved on the engine's plans, and the probes are counted."""
    monkeypatch.delitem(ROWS, "qwen3moe")
    machine = cluster(workers, 12000.0)
    found = solve_request(
        resolve_model("qwen3-30b-a3b-q4"), machine, Request(ctx_tokens=8192, ubatch_tokens=512),
        make_engine_planner(engine, machine, "llama-server"),
    )  # fmt: skip
    assert found.solutions[0].label == "planned"
    assert "probe plans in" in found.warnings[-1]
    assert int(found.warnings[-1].split("planned it, ")[1].split(" probe")[0]) > 0


def test_candidate_over_a_cap_is_searched_anew() -> None:
    """A planner that plans 100 MiB more than estimated gets placements that fit with them."""
    asked: list[Assignment] = []

    def engine_planner(problem: Problem, assignments: list[Assignment]) -> list[PlannedPlacement]:
        from placement.predict.check import device_use

        verdicts = []
        for each in assignments:
            asked.append(each)
            plan_ = plan_compute(problem.model, problem.machine, each, problem.program)
            more = {name: size + 100 * MIB for name, size in plan_.compute_bytes.items()}
            heavier = dataclasses.replace(plan_, compute_bytes=more)
            verdicts.append(PlannedPlacement(heavier, device_use(problem, each, heavier)))
        return verdicts

    model, machine = expert_model(), two_cards(500.0, 400.0)
    found = solve_request(model, machine, Request(), engine_planner)
    assert found.solutions
    assert len(asked) > len(found.solutions)
    for solution in found.solutions:
        assert all(use.headroom_mib >= 0 for use in solution.devices.values())
        assert solution.label == "planned"


def test_named_engine_must_be_there(tmp_path: Path) -> None:
    """`--engine PATH` without an engine is an error; auto without one means estimates."""
    machine = two_cards(500.0, 400.0)
    with pytest.raises(EngineMissing):
        choose_engine(str(tmp_path), machine)
    assert choose_engine("off", machine) == (None, "")


def test_missing_engine_of_the_environment_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PLACE_ENGINE that is not there leaves estimates, with a line that names it."""
    monkeypatch.setenv("PLACE_ENGINE", str(tmp_path / "nothing"))
    engine, reason = choose_engine("auto", two_cards(500.0, 400.0))
    assert engine is None
    assert "nothing" in reason


@pytest.mark.engine
def test_named_engine_must_have_the_cards(engine: Engine) -> None:
    """A named engine without the machine's cards is an error that says what it has; auto says so and estimates."""
    machine = two_cards(500.0, 400.0)
    with pytest.raises(InputError, match="CUDA0"):
        choose_engine(str(engine.folder), machine)


@pytest.mark.parametrize("server", ["nohost", "host:", "host:99999", ":50052"])
def test_rpc_server_is_host_and_port(server: str) -> None:
    """`--rpc` takes host:port only."""
    with pytest.raises(InputError, match="--rpc"):
        with_rpc_devices(two_cards(500.0, 400.0), [server], None)


@pytest.mark.engine
def test_rpc_servers_alone_make_a_machine(engine: Engine, workers: tuple[RpcWorker, ...]) -> None:
    """Without a GPU, `--rpc` gives a machine of the servers' devices with the memory that the engine sees."""
    machine = with_rpc_devices(
        options.machine_of(None, [workers[0].endpoint]), [worker.endpoint for worker in workers], engine
    )
    assert ["RPC0", "RPC1"] == [device.name for device in machine.devices]
    assert all(device.usable_mib > 100 for device in machine.devices)
