"""The user's own llama.cpp as the planner: its plans replace our estimates, without loading weights.

For the search a plan's compute bytes are the engine's own total minus our weights and context, so that whatever
we got wrong anywhere counts against the caps; what is shown are the engine's figures as it printed them.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from dataclasses import replace

from placement.engine.cache import PlanCache
from placement.engine.find import Engine, find_engine, list_devices
from placement.engine.plan import EnginePlan, measuring_program, plan_many, program_flags
from placement.errors import EngineError, EngineMissing, InputError
from placement.inputs.machine import Device, Machine
from placement.inputs.machine_files import DEFAULT_RPC_BANDWIDTH_GB_PER_S
from placement.inputs.problem import HOST, Assignment, Problem
from placement.llamacpp.emit.arguments import emit_arguments
from placement.llamacpp.emit.devices import engine_devices, rpc_servers
from placement.llamacpp.memory import static_memory
from placement.llamacpp.plan import ComputePlan
from placement.predict.check import device_use
from placement.predict.solution import DeviceUse, EnginePlanner, PlannedPlacement
from placement.units import MIB

DEFAULT_RPC_LINK_GB_PER_S = 1.0  # ten gigabit Ethernet
N_SIDE_BY_SIDE = 4
PLAN_TIMEOUT_S = 60.0


def make_engine_planner(engine: Engine, machine: Machine, program: str) -> EnginePlanner:
    """A planner for `solve`: the engine's plans, side by side, remembered in the user's cache.

    What the engine must be asked once (its flags and devices) is asked while the search runs.
    """
    cache = PlanCache(engine)
    servers = rpc_servers(machine)

    def prepare() -> None:
        with contextlib.suppress(EngineError):
            program_flags(engine, measuring_program(engine, program))
        cache.warm(servers)

    threading.Thread(target=prepare, daemon=True).start()

    def engine_planner(problem: Problem, assignments: list[Assignment]) -> list[PlannedPlacement]:
        arguments = [
            emit_arguments(problem.model, problem.machine, each, problem.program) for each in assignments
        ]
        plans = plan_many(
            engine, problem.model, arguments,
            program=problem.program, cache=cache, timeout_s=PLAN_TIMEOUT_S, n_side_by_side=N_SIDE_BY_SIDE,
        )  # fmt: skip
        return [verdict(problem, *pair) for pair in zip(assignments, plans, strict=True)]

    return engine_planner


def verdict(problem: Problem, assignment: Assignment, plan: EnginePlan) -> PlannedPlacement:
    """An engine's plan of an assignment, for the search and as printed."""
    compute = plan_of_engine(problem, assignment, plan)
    return PlannedPlacement(compute, planned_use(problem, assignment, compute, plan))


def plan_of_engine(problem: Problem, assignment: Assignment, plan: EnginePlan) -> ComputePlan:
    """An engine's plan in the search's terms; the engine rounds down, so a MiB is added to every device."""
    static = static_memory(problem.model, problem.machine, assignment)
    n_bytes = {}
    for name, memory in static.items():
        engine = _memory_of(problem.machine, plan, name)
        if engine is not None:
            n_bytes[name] = int((engine + 1) * MIB) - memory.weights_bytes - memory.context_bytes
    return ComputePlan(
        compute_bytes=n_bytes,
        splits_prompt=plan.splits_prompt if plan.splits_prompt is not None else 0,
        splits_decode=plan.splits_decode if plan.splits_decode is not None else 0,
        n_nodes_prompt=plan.nodes_prompt or 0,
        n_nodes_decode=plan.nodes_decode or plan.nodes_prompt or 0,
        n_copies=plan.n_copies or 1,
        is_exact=True,
        notes=(),
    )


def _engine_name(machine: Machine, name: str, plan: EnginePlan) -> str:
    """A device as the plan's rows call it: its name, or the RPC buffer with its address."""
    if name in plan.devices or name == HOST:
        return name
    found = engine_devices(machine, rpc_servers(machine))
    return next(each.buffer_name for each in found if each.device.name == name)


def _memory_of(machine: Machine, plan: EnginePlan, name: str) -> float | None:
    row = plan.devices.get(_engine_name(machine, name, plan))
    return None if row is None else row.total_mib


def planned_use(
    problem: Problem, assignment: Assignment, compute: ComputePlan, plan: EnginePlan
) -> dict[str, DeviceUse]:
    """Memory of every device with the engine's own figures where it printed them."""
    found = {}
    for name, use in device_use(problem, assignment, compute).items():
        row = plan.devices.get(_engine_name(problem.machine, name, plan))
        found[name] = use if row is None else replace(
            use,
            weights_mib=row.weights_mib,
            context_mib=row.context_mib,
            compute_mib=row.compute_mib,
            planned_total_mib=row.total_mib + 1.0,
        )  # fmt: skip
    return found


def choose_engine(spec: str, machine: Machine) -> tuple[Engine | None, str]:
    """The engine that plans for this machine, or None and why not; "auto" never fails, a named one must work.

    Raises:
        EngineError: a named engine is missing or broken.
        InputError: a named engine does not have the machine's devices.
    """
    is_auto = spec in ("", "auto")
    try:
        engine = find_engine(spec)
        if engine is None:
            return None, ""
        reason = _mismatch(engine, machine)
    except EngineMissing as exc:
        if is_auto:
            return None, f"{exc}: numbers are estimates" if os.environ.get("PLACE_ENGINE") else ""
        raise
    except EngineError as exc:
        if is_auto:
            return None, f"{exc}: numbers are estimates"
        raise
    if reason and not is_auto:
        raise InputError("--engine", reason, value=spec)
    return (None, f"{reason}: numbers are estimates") if reason else (engine, "")


def _mismatch(engine: Engine, machine: Machine) -> str:
    """Why the engine cannot plan for the machine's devices; empty when it can."""
    listed = {row.name: row for row in list_devices(engine, rpc_servers(machine))}
    local = [device for device in machine.devices if not device.is_rpc]
    missing = [device.name for device in local if device.name not in listed]
    if not missing:
        return ""
    has = ", ".join(listed) or "no GPU"
    return f"{engine.folder} has no {', '.join(missing)} (it has {has})"


def with_rpc_devices(machine: Machine, servers: Sequence[str], engine: Engine | None) -> Machine:
    """The machine with a device for each one behind the RPC servers, memory as the engine sees it.

    Raises:
        InputError: a server that is not "host:port", or unknown devices and no engine to ask.
        EngineError: the engine cannot reach a server.
    """
    known = {device.address for device in machine.devices}
    new = [server for server in dict.fromkeys(servers) if server not in known]
    if not new:
        return machine
    for server in new:
        host, _, port = server.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise InputError("--rpc", 'must be "host:port"', value=server)
    if engine is None:
        raise InputError(
            "--rpc", "needs an engine to ask for its devices, or a machine file that has them", value=new[0]
        )
    remote: list[Device] = []
    for server in new:
        for row in list_devices(engine, (server,)):
            if row.name.startswith("RPC"):
                number = sum(device.is_rpc for device in machine.devices) + len(remote)
                remote.append(
                    _rpc_device(f"RPC{number}", server, row.description, row.total_mib, row.free_mib)
                )
    if not remote:
        raise InputError("--rpc", "the engine finds no device behind it", value=new[0])
    return replace(machine, devices=(*machine.devices, *remote))


def _rpc_device(name: str, address: str, description: str, total_mib: float, free_mib: float) -> Device:
    return Device(
        name=name,
        description=description,
        address=address,
        total_mib=max(total_mib, 1.0),
        usable_mib=max(min(free_mib, total_mib), 1.0),
        runtime_mib=0.0,
        bandwidth_gb_per_s=DEFAULT_RPC_BANDWIDTH_GB_PER_S,
        link_gb_per_s=DEFAULT_RPC_LINK_GB_PER_S,
    )
