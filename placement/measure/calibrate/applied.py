"""Fits → the machine with their coefficients, the values they replace kept in its history."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from placement.inputs.coefficients import MEMORY
from placement.inputs.machine import Coefficient, Machine, Past
from placement.measure.calibrate.fit import Calibration
from placement.measure.calibrate.memory import MemoryFit
from placement.measure.calibrate.parameters import prior_of
from placement.predict.terms import coefficient

KEPT_PER_NAME = 10  # values of a coefficient in the history


@dataclass(frozen=True, slots=True)
class Change:
    """A coefficient before and after; `old` None: it was not in the machine file."""

    name: str
    old: Coefficient | None
    new: Coefficient
    is_identified: bool


def apply_fit(
    machine: Machine, fits: Iterable[Calibration], memory: Sequence[MemoryFit], date: str
) -> tuple[Machine, tuple[Change, ...]]:
    """The machine with what was identified, and the changes; what was not keeps its prior.

    `date` is ISO 8601. A machine without changes is returned as it is.
    """
    wanted = _wanted(machine, fits, date) | _memory_wanted(memory, date)
    changes = [
        Change(name, machine.coefficients.get(name), new, new.source == "calibrated")
        for name, new in wanted.items()
        if not _is_same(machine.coefficients.get(name), new)
    ]
    if not changes:
        return machine, ()
    coefficients = {**machine.coefficients, **{each.name: each.new for each in changes}}
    history = [*machine.history, *(Past(each.name, _before(machine, each), date) for each in changes)]
    runtimes = {each.device: each.runtime_mib + each.growth_mib for each in memory}
    devices = tuple(
        replace(device, runtime_mib=round(runtimes[device.name], 1)) if device.name in runtimes else device
        for device in machine.devices
    )
    return replace(machine, coefficients=coefficients, history=_shortened(history), devices=devices), tuple(
        changes
    )


def _wanted(machine: Machine, fits: Iterable[Calibration], date: str) -> dict[str, Coefficient]:
    """Identified coefficients; then the priors of the others, where the machine would now say something else."""
    kept = list(fits)
    wanted = {
        each.name: fit.coefficient(each.name, date)
        for fit in kept
        for each in fit.parameters
        if each.name not in fit.unidentified and fit.n_samples[each.name]
    }
    after = replace(machine, coefficients={**machine.coefficients, **wanted})
    for fit in kept:
        for each in fit.parameters:
            if each.name not in wanted and abs(coefficient(after, each.name) - each.prior) > 1e-9:
                prior = prior_of(machine, each.name)
                wanted[each.name] = replace(prior, unit=each.unit)
    return wanted


def _memory_wanted(memory: Sequence[MemoryFit], date: str) -> dict[str, Coefficient]:
    wanted = {}
    for fit in memory:
        for name in MEMORY:
            value = round(float(getattr(fit, name)), 1)
            spread = None if name == "margin_mib" else round(fit.spread_mib, 1)
            wanted[f"{name}.{fit.device}"] = Coefficient(
                value, "MiB", "calibrated", date, fit.n_samples, spread
            )
    return wanted


def _is_same(old: Coefficient | None, new: Coefficient) -> bool:
    return old is not None and replace(old, date=None) == replace(new, date=None)


def _before(machine: Machine, change: Change) -> Coefficient:
    """What the speed model used before the change."""
    if change.old is not None:
        return change.old
    base, _, device = change.name.partition(".")
    if base in MEMORY:
        value = machine.device(device).runtime_mib if base == "runtime_mib" else 0.0
        return Coefficient(value, "MiB")
    return replace(prior_of(machine, change.name), unit=change.new.unit)


def _shortened(history: Sequence[Past]) -> tuple[Past, ...]:
    """The newest values of each name, and the oldest: a later fit starts from what was there before any."""
    kept: list[Past] = []
    for i, each in enumerate(history):
        mine = [j for j, other in enumerate(history) if other.name == each.name]
        if i == mine[0] or i in mine[-KEPT_PER_NAME:]:
            kept.append(each)
    return tuple(kept)
