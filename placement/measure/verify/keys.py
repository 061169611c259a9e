"""What a measurement depends on: the machine, the build, the driver and clocks, the model, what is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from placement.engine.find import Engine, describe_engine
from placement.inputs.identity import machine_identity
from placement.inputs.machine import Machine
from placement.inputs.model import Model
from placement.measure.verify.prompts import Asked
from placement.measure.verify.watch import driver_version, memory_clock

if TYPE_CHECKING:
    from placement.measure.records.schema import Key


def make_key(engine: Engine, machine: Machine, model: Model, asked: Asked, nvml: Any | None) -> Key:
    """Return the key of what is measured now; `model` is the file that runs."""
    from placement.measure.records.schema import Key

    return Key(
        engine_build=describe_engine(engine).version,
        engine_fingerprint=engine.fingerprint(),
        model_digest=model.digest,
        machine=machine_identity(machine),
        driver=driver_version(nvml),
        memory_clock=memory_clock(machine, nvml),
        plan=asked.text(),
    )
