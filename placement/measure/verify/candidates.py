"""Solutions → what is run: moderate, aggressive, the others, and `--fit` at the memory of each."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from placement.inputs.engine_options import OPTIONS
from placement.inputs.machine import Device, Machine, margin_mib
from placement.llamacpp.emit.devices import rpc_servers
from placement.predict.solution import AGGRESSIVE, MODERATE, MODERATE_RESERVE, Solution

if TYPE_CHECKING:
    from placement.engine.find import ListedDevice
    from placement.measure.records.schema import Predicted

SOLUTION, FIT = "solution", "fit"

# What --fit decides instead, and what it is told for that.
_FOR_FIT = tuple(option for option in OPTIONS if option.role == "place" or option.name in ("-fit", "-fitt"))
_N_VALUES = {name: int(option.has_value) for option in _FOR_FIT for name in option.names}


@dataclass(frozen=True, slots=True)
class VerifyCandidate:
    """Engine arguments to run. `caps_mib` is what the engine may take of each GPU, the runtime apart."""

    name: str
    role: str
    arguments: tuple[str, ...]
    caps_mib: dict[str, float]
    n_host_layers: int | None = None
    solution: Solution | None = field(default=None, compare=False)

    @property
    def run_id(self) -> str:
        """12 hex digits by which a rerun knows it: the arguments, and for `--fit` the memory it gets."""
        caps = sorted(self.caps_mib.items()) if self.role == FIT else []
        return hashlib.sha256(json.dumps([self.arguments, caps]).encode()).hexdigest()[:12]

    def arguments_on(self, devices: Sequence[ListedDevice]) -> tuple[str, ...]:
        """Return the arguments to run now: `--fit` is told what to leave free of what is free."""
        if self.role != FIT or not devices:
            return self.arguments
        targets = fit_targets_mib(self.caps_mib, devices)
        return (*self.arguments, "-fitt", ",".join(map(str, targets)))

    def predicted(self) -> Predicted | None:
        """What the solve predicted; None for `--fit`, of which nothing is."""
        from placement.measure.records.schema import Predicted

        if self.solution is None:
            return None
        speed = self.solution.speed
        return Predicted(
            label=self.solution.label,
            self_mib={name: round(use.self_mib, 1) for name, use in self.solution.devices.items()},
            splits_decode=self.solution.splits_decode,
            decode_tps=round(speed.decode_tps, 3),
            prompt_tps=None if speed.prompt_tps is None else round(speed.prompt_tps, 2),
            turn_s=round(speed.turn_s, 4),
        )


def choose(solutions: Sequence[Solution], top: int) -> list[Solution]:
    """Return the `top` solutions to run: moderate, aggressive, then the others as they stand.

    Where two are the same arguments one run serves both, under the bolder name.
    """
    rank = {AGGRESSIVE: 0, MODERATE: 1}
    kept: dict[tuple[str, ...], Solution] = {}
    for each in sorted(solutions, key=lambda solution: rank.get(solution.name, 2)):
        kept.setdefault(each.args, each)
    order = {MODERATE: 0, AGGRESSIVE: 1}
    return sorted(kept.values(), key=lambda solution: order.get(solution.name, 2))[:top]


def make_candidates(
    solutions: Sequence[Solution], machine: Machine, extra_args: Sequence[str], reserve_mib: float = 0.0
) -> list[VerifyCandidate]:
    """Return the solutions, named ones first with `--fit` at their memory, then the others with theirs.

    A `--fit` that would be the same run as an earlier one is left out.
    """
    tried = []
    for solution in solutions:
        caps = caps_mib(solution, machine, reserve_mib)
        arguments = (*solution.args, *extra_args)
        tried.append(
            VerifyCandidate(solution.name, SOLUTION, arguments, caps, solution.n_host_layers(), solution)
        )
    fits: dict[str, VerifyCandidate] = {}
    for each in tried:
        arguments = (*with_workers(without_placement(each.arguments), machine), "-fit", "on")
        fit = VerifyCandidate(f"fit:{each.name}", FIT, arguments, each.caps_mib)
        fits.setdefault(fit.run_id, fit)
    named = {MODERATE, AGGRESSIVE}
    pairs = [
        (each.name.removeprefix("fit:") not in named, each.role == FIT, index, each)
        for index, each in enumerate([*tried, *fits.values()])
    ]
    return [each for *_, each in sorted(pairs, key=lambda row: row[:3])]


def caps_mib(solution: Solution, machine: Machine, reserve_mib: float) -> dict[str, float]:
    """Return what a solution was allowed to take of every GPU of the machine, the runtime not counted.

    Moderate keeps what runs have taught to keep free, or a share of the card.
    """

    def kept_mib(device: Device) -> float:
        learned = margin_mib(machine, device.name)
        if solution.name != MODERATE:
            return 0.0
        return MODERATE_RESERVE * device.total_mib if learned is None else learned

    return {
        each.name: each.usable_mib - each.runtime_mib - reserve_mib - kept_mib(each)
        for each in machine.devices
    }


def fit_targets_mib(caps: dict[str, float], devices: Sequence[ListedDevice]) -> list[int]:
    """Return what `--fit` shall leave free on each of the engine's devices: free less cap, rounded up.

    A device that the machine does not name is left entirely free.
    """
    targets = []
    for device in devices:
        cap = caps.get(device.name, 0.0)
        targets.append(max(0, math.ceil(device.free_mib - cap)))
    return targets


def with_workers(arguments: tuple[str, ...], machine: Machine) -> tuple[str, ...]:
    """Return the arguments with the machine's RPC workers, which a placement that uses none does not name."""
    servers = rpc_servers(machine)
    if not servers or "--rpc" in arguments:
        return arguments
    return ("--rpc", ",".join(servers), *arguments)


def without_placement(arguments: Sequence[str]) -> tuple[str, ...]:
    """Return the arguments that do not say where anything is placed."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument in _N_VALUES:
            for _ in itertools.islice(rest, _N_VALUES[argument]):
                pass
        else:
            kept.append(argument)
    return tuple(kept)
