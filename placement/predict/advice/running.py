"""Advice on how the engine runs: load mode, batches, fit, pipeline, caps, and options that do not work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from placement.inputs.problem import CPU, HOST
from placement.llamacpp.backend_rules import PINNED_LOAD_MODES
from placement.predict.advice.case import Advice, Case, count
from placement.predict.rates import link_place, stream_s_per_byte
from placement.units import MIB, format_bytes

MIN_STREAMED_BYTES = 64 * MIB


def split_mode_row(case: Case) -> Iterator[Advice]:
    """`-sm row`: current CUDA and RPC backends refuse to load."""
    if case.assignment.settings.split_mode == "row":
        n_devices = len(case.assignment.devices)
        yield Advice(
            "split-mode-row",
            f"-sm row does not load on {count(n_devices, 'device')}: they do not support split buffers; "
            f"use -sm layer",
        )


def layers_left_on_cpu(case: Case) -> Iterator[Advice]:
    """`-ngl` one or two short, often because the output counts as a layer."""
    homes = case.assignment.homes
    on_cpu = [i for i, home in enumerate(homes) if home == CPU]
    if not case.assignment.devices or not 0 < len(on_cpu) <= min(2, len(homes) - 2):
        return
    n_bytes = sum(t.n_bytes for i in on_cpu for t in case.layers.get(i, []))
    yield Advice(
        "layers-left-on-cpu",
        f"-ngl {len(homes) - len(on_cpu)} leaves {count(len(on_cpu), 'layer')} ({format_bytes(n_bytes)}) "
        f"on the CPU, "
        f"because the output counts as a layer: use -ngl {len(homes)}",
    )


def removed_options(case: Case) -> Iterator[Advice]:
    """Options that this engine build no longer takes."""
    for option, instead in case.arguments.removed:
        yield Advice("removed-option", f"1 option is gone from current builds: {option}; write {instead}")


def ubatch_above_batch(case: Case) -> Iterator[Advice]:
    """The engine cuts the ubatch to the batch."""
    settings = case.assignment.settings
    if settings.ubatch_tokens > settings.batch_tokens:
        yield Advice(
            "ubatch-above-batch",
            f"-ub {settings.ubatch_tokens} is cut to -b {settings.batch_tokens}; raise -b to "
            f"{settings.ubatch_tokens}",
        )


def fit_left_on(case: Case) -> Iterator[Advice]:
    """`--fit`, on by default, beside arguments that make it give up, or without any."""
    arguments = case.arguments
    if arguments.is_fit is False or case.program != "llama-server" or not case.assignment.devices:
        return
    given = ["-ngl"] if arguments.n_gpu_layers is not None and arguments.n_gpu_layers >= 0 else []
    given += ["-ts"] if arguments.tensor_split and any(arguments.tensor_split) else []
    given += sorted({override.option for override in arguments.overrides})
    if given:
        yield Advice(
            "fit-left-on",
            f"--fit is on but gives up beside {count(len(given), 'explicit argument')} "
            f"({', '.join(given)}): it only "
            "warns, then loads as written; say -fit off",
        )
        return
    need, cap = _needs(case), _caps(case)
    short = sum(max(need[name] - cap[name], 0) for name in need if name != HOST)
    if short:
        yield Advice(
            "fit-changes-placement",
            f"this does not fit by {format_bytes(short)}, so --fit will move tensors or cut the context: "
            f"what runs is "
            "not what is shown here",
        )


def mapped_weights(case: Case) -> Iterator[Advice]:
    """Memory-mapped CPU weights stream to the first card at pageable speed."""
    settings = case.assignment.settings
    devices = case.assignment.devices
    used = case.tensor_devices
    n_bytes = sum(t.n_bytes for tensors in case.layers.values() for t in tensors if used[t.name] == CPU)
    pageable = link_place(case.machine, devices, replace(settings, load_mode="mmap"))
    pinned = link_place(case.machine, devices, replace(settings, load_mode="none"))
    if settings.load_mode in PINNED_LOAD_MODES or n_bytes < MIN_STREAMED_BYTES:
        return
    if pageable is None or pinned is None:
        return
    pageable_s, pinned_s = (n_bytes * stream_s_per_byte(case.machine, each) for each in (pageable, pinned))
    room = case.machine.cpu.usable_mib * MIB - _needs(case)[HOST]
    fits = "" if room >= 0 else f", though the host lacks {format_bytes(-room)} for it"
    yield Advice(
        "mmap-cpu-weights",
        f"{format_bytes(n_bytes)} of memory-mapped CPU weights stream to {pageable.name} for every ubatch of "
        f"a prompt: {pageable_s:.2f} s pageable, {pinned_s:.2f} s pinned with -lm none{fits}",
    )


def pipeline(case: Case) -> Iterator[Advice]:
    """Pipeline parallelism: the memory that it takes, or that an override without effect gave up."""
    if case.planner is None or case.plan is None or len(case.assignment.devices) < 2:
        return
    settings = case.assignment.settings
    if case.plan.n_copies > 1:
        without = case.planner(replace(case.assignment, settings=replace(settings, has_overrides=True)))
        extra = sum(case.plan.compute_bytes.values()) - sum(without.compute_bytes.values())
        yield Advice(
            "pipeline-on",
            f"pipeline parallelism keeps {case.plan.n_copies} copies of a prompt's inputs in "
            f"{format_bytes(extra)} of "
            "compute buffers; -ot '^$=CPU', which matches nothing, turns it off",
        )
    elif settings.has_overrides and not case.assignment.moved:
        with_it = case.planner(replace(case.assignment, settings=replace(settings, has_overrides=False)))
        extra = sum(with_it.compute_bytes.values()) - sum(case.plan.compute_bytes.values())
        if with_it.n_copies > 1:
            yield Advice(
                "pipeline-off",
                f"overrides that move nothing turn pipeline parallelism off: {format_bytes(extra)} less "
                f"of compute "
                f"buffers, but {count(len(case.assignment.devices), 'card')} take turns at a prompt; "
                f"drop them for speed",
            )


def devices_over_cap(case: Case) -> Iterator[Advice]:
    """Devices, or the host, that are asked for more than they may give."""
    need, cap = _needs(case), _caps(case)
    for name, n_bytes in need.items():
        if n_bytes > cap[name]:
            code = "host-memory" if name == HOST else "device-memory"
            where = "the host" if name == HOST else name
            yield Advice(
                code,
                f"{where} needs {n_bytes / MIB:,.0f} MiB and may give {cap[name] / MIB:,.0f}: "
                f"{(n_bytes - cap[name]) / MIB:,.0f} too many",
            )


def _needs(case: Case) -> dict[str, int]:
    """Bytes of weights, context and, where planned, compute buffers."""
    compute = case.plan.compute_bytes if case.plan is not None else {}
    return {
        name: memory.weights_bytes + memory.context_bytes + compute.get(name, 0)
        for name, memory in case.memory.items()
    }


def _caps(case: Case) -> dict[str, float]:
    caps = {device.name: (device.usable_mib - device.runtime_mib) * MIB for device in case.gpus}
    return {**caps, HOST: case.machine.cpu.usable_mib * MIB}
