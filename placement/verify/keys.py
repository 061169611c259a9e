"""What a measurement depends on: the machine, the build, the driver and clocks, the model, what is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from placement.engine import Engine, describe
from placement.identity import machine_identity
from placement.machine import Machine
from placement.model import Model
from placement.verify.prompts import Asked
from placement.verify.watch import driver_version, memory_clock

if TYPE_CHECKING:
    from placement.verify.schema import Key


def make_key(engine: Engine, machine: Machine, model: Model, asked: Asked, nvml: Any | None) -> Key:
    """Return the key of what is measured now; `model` is the file that runs."""
    from placement.verify.schema import Key

    return Key(
        engine_build=describe(engine).version,
        engine_fingerprint=engine.fingerprint(),
        model_digest=model.digest,
        machine=machine_identity(machine),
        driver=driver_version(nvml),
        memory_clock=memory_clock(machine, nvml),
        plan=asked.text(),
    )
