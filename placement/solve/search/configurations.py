"""What the search may choose, and the configurations that this leaves."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from placement.inputs.problem import DEFAULT_UBATCH_TOKENS, Problem, Settings
from placement.llamacpp.context_rules import can_pipeline
from placement.predict.rates import link_place, stream_s_per_byte
from placement.predict.terms import coefficient
from placement.solve.frames.pieces import NO_PINS, Pins
from placement.solve.frames.tables import Configuration

UBATCHES = (256, 512, 1024, 2048, 4096)
MAX_ORDERED_DEVICES = 3  # up to here every subset in every order is tried
FEWER_THREADS = (0.25, 0.5, 0.75)  # of the cores


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """What the search may choose; a single value fixes it."""

    ubatches: tuple[int, ...] = UBATCHES
    load_modes: tuple[str, ...] = ("auto", "none")
    orders: tuple[tuple[str, ...], ...] | None = None
    pins: Pins = NO_PINS
    reserve_fraction: float = 0.0  # of each card's total, on top of the problem's reserve
    decode_weight: int = 1
    prompt_weight: int = 1
    max_host_layers: int | None = None
    max_decode_s: float | None = None  # per generated token
    max_prompt_s: float | None = None  # of the whole prompt

    @property
    def weights(self) -> tuple[int, int]:
        """Of decode and prompt."""
        return self.decode_weight, self.prompt_weight


def device_orders(problem: Problem) -> list[tuple[str, ...]]:
    """Device subsets and orders worth trying; equal devices are interchangeable and kept in engine order."""
    devices = problem.machine.devices
    names = [device.name for device in devices]
    same_as = {device.name: replace(device, name="", uuid=None, address=None) for device in devices}
    orders: Iterable[tuple[str, ...]]
    if len(names) <= MAX_ORDERED_DEVICES:
        lengths = range(1, len(names) + 1)
        orders = itertools.chain.from_iterable(itertools.permutations(names, n) for n in lengths)
    else:
        fastest = sorted(names, key=lambda name: -same_as[name].bandwidth_gb_per_s)
        orders = [tuple(row[:n]) for row in (names, fastest) for n in range(1, len(names) + 1)]
    kept: dict[tuple[object, ...], tuple[str, ...]] = {}
    for order in orders:
        kept.setdefault(tuple(same_as[name] for name in order), order)
    return list(kept.values())


def configurations(problem: Problem, space: SearchSpace) -> Iterator[Configuration]:
    """Every configuration of the search space; an ubatch of more than twice the prompt adds nothing."""
    smallest = min(space.ubatches)
    longest = max(2 * problem.workload.prompt_tokens, smallest + 1)
    orders = space.orders if space.orders is not None else tuple(device_orders(problem))
    # what a pipeline gains by finer ubatches is believed only once it was measured: each reads all weights again
    is_known = "pipeline_overlap" in problem.machine.coefficients
    least_pipelined = smallest if is_known else min(DEFAULT_UBATCH_TOKENS, max(space.ubatches))
    for order, ubatch in itertools.product(orders or ((),), space.ubatches):
        if ubatch >= longest:
            continue
        batch = max(problem.settings.batch_tokens, ubatch)
        settings = replace(problem.settings, ubatch_tokens=ubatch, batch_tokens=batch)
        if order:
            yield Configuration(order, settings, uses_host=False)
        can_overlap = can_pipeline(replace(settings, has_overrides=False), len(order))
        if can_overlap and ubatch >= least_pipelined:
            yield Configuration(order, settings, uses_host=False, is_pipelined=True)
        loaded = _fastest_loading(problem, order, settings, space.load_modes)
        for n_threads in thread_counts(problem):
            yield Configuration(order, replace(loaded, n_threads=n_threads), uses_host=True)


def thread_counts(problem: Problem) -> tuple[int | None, ...]:
    """CPU threads worth trying where the host is used; None leaves them to the engine, which takes one a core.

    Fewer are worth it only where the machine knows that each costs something.
    """
    fixed, n_cores = problem.settings.n_threads, problem.machine.cpu.threads
    if fixed is not None or coefficient(problem.machine, "thread_us") <= 0:
        return (fixed,)
    return (None, *sorted({max(1, round(n_cores * share)) for share in FEWER_THREADS} - {n_cores}))


def _fastest_loading(
    problem: Problem, order: tuple[str, ...], settings: Settings, modes: tuple[str, ...]
) -> Settings:
    """The settings with the load mode that streams fastest; memory and decode time are the same in all of them."""
    machine = problem.machine

    def byte_s(each: Settings) -> float:
        link = link_place(machine, order, each)
        return 0.0 if link is None else stream_s_per_byte(machine, link)

    return min((replace(settings, load_mode=mode) for mode in modes), key=byte_s)
