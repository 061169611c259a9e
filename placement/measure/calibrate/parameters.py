"""The coefficients that runs can teach a machine, and what is believed of each before any run.

A prior is the machine's newest value that did not come from runs recorded here: a default, a detected one, or
what the machine file shipped with. Fits always start from it, so fitting the same runs twice changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from placement.inputs.coefficients import DEFAULTS, SERVED_BY
from placement.inputs.machine import Coefficient, Device, Machine
from placement.inputs.problem import CPU
from placement.predict.terms import Phase, fitted_in

ALIKE = 0.5  # correlation between the devices of one machine: they share a build and a driver
LEAST_SPREAD = 0.05


@dataclass(frozen=True, slots=True)
class Parameter:
    """One coefficient to fit: its name in the machine file, its prior, and the prior's spread.

    `is_log`: the spread is a share, and the value stays positive; else both are in the unit, and it may be zero.
    """

    name: str
    prior: float
    spread: float
    is_log: bool
    unit: str

    @property
    def base(self) -> str:
        """The name without its device."""
        return self.name.partition(".")[0]


def parameters(machine: Machine, kind: Phase) -> tuple[Parameter, ...]:
    """The coefficients of decode or of prompts that this machine has, in a fixed order."""
    return tuple(_parameter(machine, name) for name in full_names(machine, fitted_in(kind)))


def full_names(machine: Machine, bases: tuple[str, ...]) -> tuple[str, ...]:
    """The coefficients under all names that a machine has of them: each device's, the CPU's, the machine's."""
    devices = [device.name for device in machine.devices]
    cuda = [device.name for device in machine.devices if device.is_cuda]
    has_worker = any(device.is_rpc for device in machine.devices)
    scoped = [(base, DEFAULTS[base].scope) for base in bases]
    return (
        *(f"{base}.{name}" for base, scope in scoped if scope in ("device", "place") for name in devices),
        *(f"{base}.{CPU}" for base, scope in scoped if scope == "place"),
        *(f"{base}.{name}" for base, scope in scoped if scope == "cuda" for name in cuda),
        *(base for base, scope in scoped if scope == "machine" or (scope == "workers" and has_worker)),
    )


def _parameter(machine: Machine, name: str) -> Parameter:
    default, prior = DEFAULTS[name.partition(".")[0]], prior_of(machine, name)
    is_log = prior.value > 0 and not default.may_be_zero
    spread = _spread(machine, name, is_log)
    is_own = name in machine.coefficients or any(each.name == name for each in machine.history)
    if is_own and prior.source == "detected" and prior.uncertainty is not None:
        spread = max(prior.uncertainty / prior.value, LEAST_SPREAD) if is_log else max(prior.uncertainty, 1.0)
    return Parameter(name, prior.value, spread, is_log, default.unit)


def _spread(machine: Machine, name: str, is_log: bool) -> float:
    """How far off the prior may well be on this machine, as a share if `is_log`, else in the unit.

    Raises:
        ValueError: no run teaches the coefficient.
    """
    base, _, where = name.partition(".")
    default = DEFAULTS[base]
    if default.spread is None:
        raise ValueError(f"{base} is not fitted")
    concerned: tuple[Device, ...] = machine.devices
    if where:
        concerned = tuple(device for device in machine.devices if device.name == where)
    if default.rpc_spread is not None and any(device.is_rpc for device in concerned):
        return default.rpc_spread
    if default.cpu_spread is not None and where == CPU:
        return default.cpu_spread
    has_cuda = any(device.is_cuda for device in machine.devices)
    if default.no_card_spread is not None and is_log and not has_cuda:
        return default.no_card_spread
    is_nothing = not is_log and not default.may_be_zero  # a file says so
    return default.spread * default.value if is_nothing else default.spread


def prior_of(machine: Machine, name: str) -> Coefficient:
    """What is believed of a coefficient without the runs recorded here."""
    past = [each.coefficient for each in machine.history if each.name == name]
    kept = machine.coefficients.get(name)
    values = [*past, *([kept] if kept is not None else [])]
    believed = [each for each in values if each.source != "calibrated"]
    if believed:
        return believed[-1]
    if values:
        return values[0]  # came with the file
    if name in SERVED_BY:
        return prior_of(machine, SERVED_BY[name])
    base, _, where = name.partition(".")
    return prior_of(machine, base) if where else Coefficient(DEFAULTS[base].value, DEFAULTS[base].unit)
