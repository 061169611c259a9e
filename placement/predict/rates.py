"""A machine's devices and host → the speed model's places, and the seconds that a unit of each quantity takes there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from placement.inputs.machine import Device, Machine
from placement.inputs.problem import CPU, Settings
from placement.llamacpp.backend_rules import PINNED_LOAD_MODES
from placement.predict.loads import QUANTITIES
from placement.predict.terms import DECODE, GRAPH, PROMPT, Capacity, Kind, Phase, Place, coefficient, products

RateVector = tuple[float, ...]  # in the order of QUANTITIES


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds per unit of each quantity, by place: the devices, "CPU" and GRAPH.

    `is_streamed`: prompts compute on a device what the host holds, which a link streams there.
    """

    by_phase: Mapping[Phase, Mapping[str, RateVector]]
    is_streamed: bool

    def at(self, phase: Phase, where: str) -> RateVector:
        """In the order of QUANTITIES."""
        return self.by_phase[phase][where]


def rates(machine: Machine, devices: tuple[str, ...], settings: Settings, is_offloaded: bool = True) -> Rates:
    """The rates of the devices that the engine is given, in its order."""
    result = places(machine, devices, settings, is_offloaded)
    by_phase = {
        phase: {where: unit_rates(machine, phase, place) for where, place in mine.items()}
        for phase, mine in result.items()
    }
    return Rates(by_phase, result[PROMPT][CPU].name != CPU)


def unit_rates(machine: Machine, phase: Phase, place: Place) -> RateVector:
    """Seconds per unit of each quantity at a place."""
    result = dict.fromkeys(QUANTITIES, 0.0)
    for product in products(phase, place):
        result[product.quantity] += product.unit_s(machine)
    return tuple(result.values())


def places(
    machine: Machine, devices: tuple[str, ...], settings: Settings, is_offloaded: bool = True
) -> dict[Phase, dict[str, Place]]:
    """Where each phase's work is done, by where it is held: the devices, "CPU", and GRAPH for what none holds.

    `is_offloaded`: ubatches are large enough for a prompt to compute what the host holds on the first CUDA device.
    """
    threads = cpu_threads(machine, settings)
    results = {name: _device(machine.device(name)) for name in devices}
    results[CPU] = _host(machine, threads)
    results[GRAPH] = Place(GRAPH, ("graph",), {"us": 1e6, "thread_us": 1e6 / threads})
    link = link_place(machine, devices, settings) if is_offloaded else None
    if link is None:
        return {DECODE: results, PROMPT: results}
    streamed = replace(link, kinds=(*results[link.name].kinds, *link.kinds))
    return {DECODE: results, PROMPT: {**results, CPU: streamed}}


def _device(device: Device) -> Place:
    per_second: dict[Capacity, float] = {
        "bytes": device.bandwidth_gb_per_s * 1e9,
        "link_bytes": device.link_gb_per_s * 1e9,
        "tflop_of_bandwidth": device.bandwidth_gb_per_s * 1e12,
        "us": 1e6,
    }
    if not device.tflops:
        return Place(device.name, ("device", "unrated"), per_second)
    return Place(device.name, ("device",), {**per_second, "tflop": device.tflops * 1e12})


def _host(machine: Machine, threads: int) -> Place:
    per_second: dict[Capacity, float] = {
        "bytes": machine.cpu.bandwidth_gb_per_s * 1e9,
        "thread_gb": threads * 1e9,
        "thread_tflop": threads * 1e12,
        "us": 1e6,
    }
    kinds: tuple[Kind, ...] = ("host", "few_threads") if are_threads_few(machine, threads) else ("host",)
    return Place(CPU, kinds, per_second)


def link_place(machine: Machine, devices: tuple[str, ...], settings: Settings) -> Place | None:
    """The link that streams what the host holds: to the first CUDA device; None where the CPU computes it itself."""
    if not settings.is_op_offloaded:
        return None
    first = next((name for name in devices if machine.device(name).is_cuda), None)
    if first is None:
        return None
    kind: Kind = "pinned" if settings.load_mode in PINNED_LOAD_MODES else "pageable"
    return replace(_device(machine.device(first)), kinds=(kind,))


def stream_s_per_byte(machine: Machine, link: Place) -> float:
    """Seconds in which a link streams a byte of weights."""
    return unit_rates(machine, PROMPT, link)[QUANTITIES.index("prompt_bytes")]


def cpu_threads(machine: Machine, settings: Settings) -> int:
    """The threads that the engine works with: its own choice is one a core."""
    return settings.n_threads or machine.cpu.threads


def are_threads_few(machine: Machine, threads: int) -> bool:
    """Whether fewer threads than cores read weights more slowly than the host's memory gives them."""
    together = threads * coefficient(machine, "cpu_thread_gb_per_s")
    at_most = machine.cpu.bandwidth_gb_per_s * coefficient(machine, "cpu_read_efficiency")
    return threads < machine.cpu.threads and together < at_most
