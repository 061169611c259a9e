"""The machine this runs on, from NVML and psutil; every derived number says in the file that it was detected.

Bandwidth follows from the memory clock and bus width (double data rate), the link from PCIe generation and
width, and matrix throughput from cores, clock and compute capability; the host's bandwidth is a cautious guess.
"""

from __future__ import annotations

import contextlib
import os
import platform
from typing import Any

from placement.inputs.machine import DEFAULT_LINK_GB_PER_S, DEFAULT_RUNTIME_MIB, Cpu, Device, Machine
from placement.units import MIB

# Usable GB/s per PCIe lane and generation, as host-to-device copies reach on pinned memory.
_LANE_GB_PER_S = {1: 0.2, 2: 0.4, 3: 0.8, 4: 1.6, 5: 3.2, 6: 6.4}
# Half-precision matrix operations with single-precision sums, per core and clock, relative to plain ones.
_MATRIX_FACTOR = {"7.0": 8.0, "7.5": 4.0, "8.0": 16.0, "9.0": 16.0, "10.0": 16.0, "10.3": 16.0}
_DEFAULT_MATRIX_FACTOR = 2.0
_HOST_MARGIN_MIB = 2048.0  # left to the rest of the system
_MIN_HOST_GB_PER_S = 20.0
_GB_PER_S_PER_THREAD = 3.0
_MAX_HOST_GB_PER_S = 50.0  # two channels of DDR4; more only after calibration


def detect_hardware() -> tuple[Machine | None, str]:
    """The machine here, or None and the reason in words (no driver, no GPU).

    Devices come in PCI order, the engine's own order under CUDA_DEVICE_ORDER=PCI_BUS_ID; CUDA's default puts
    the fastest card first, so where the two may differ the names should be compared with `--list-devices`.
    """
    try:
        import pynvml
    except ImportError:
        return None, "the NVML bindings are not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as exc:
        return None, f"no NVIDIA driver ({_words(exc)})"
    try:
        count = pynvml.nvmlDeviceGetCount()
        if count == 0:
            return None, "the NVIDIA driver reports no GPU"
        devices = tuple(_device(pynvml, index) for index in range(count))
    except pynvml.NVMLError as exc:
        return None, f"NVML failed ({_words(exc)})"
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
    return Machine(name=platform.node() or "this-machine", devices=devices, cpu=detect_cpu()), ""


def detect_cpu() -> Cpu:
    """The host: physical cores, memory less what the system keeps, and a cautious bandwidth."""
    import psutil

    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    total_mib = psutil.virtual_memory().total / MIB
    guess = min(max(_MIN_HOST_GB_PER_S, cores * _GB_PER_S_PER_THREAD), _MAX_HOST_GB_PER_S)
    return Cpu(
        usable_mib=max(total_mib - _HOST_MARGIN_MIB, total_mib / 2),
        bandwidth_gb_per_s=guess,
        threads=cores,
        description=_processor(),
    )


def _processor() -> str:
    """The processor's model; where the kernel does not name it, its architecture."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _device(nvml: Any, index: int) -> Device:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    capability = f"{major}.{minor}"
    return Device(
        name=f"CUDA{index}",
        description=_text(nvml.nvmlDeviceGetName(handle)),
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        compute_capability=capability,
        total_mib=memory.total / MIB,
        usable_mib=max(memory.free / MIB, 1.0),
        runtime_mib=DEFAULT_RUNTIME_MIB,
        bandwidth_gb_per_s=bandwidth_gb_per_s(
            nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM),
            nvml.nvmlDeviceGetMemoryBusWidth(handle),
        ),
        link_gb_per_s=_link(nvml, handle),
        tflops=_tflops(nvml, handle, capability),
    )


def bandwidth_gb_per_s(memory_clock_mhz: int, bus_width_bits: int) -> float:
    """Bytes per second of double-data-rate memory, in 1e9: 10501 MHz on 384 bits are 1008."""
    return round(2.0 * memory_clock_mhz * 1e6 * bus_width_bits / 8 / 1e9, 1)


def link_gb_per_s(generation: int, width: int) -> float:
    """What a PCIe link of that generation and width carries in practice, in 1e9 bytes per second."""
    newest = max(_LANE_GB_PER_S)
    return round(_LANE_GB_PER_S.get(generation, _LANE_GB_PER_S[newest]) * width, 1)


def _link(nvml: Any, handle: Any) -> float:
    try:
        generation, width = (
            nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle),
            nvml.nvmlDeviceGetMaxPcieLinkWidth(handle),
        )
    except nvml.NVMLError:
        return DEFAULT_LINK_GB_PER_S
    return link_gb_per_s(generation, width)


def _tflops(nvml: Any, handle: Any, capability: str) -> float | None:
    try:
        cores = nvml.nvmlDeviceGetNumGpuCores(handle)
        clock_mhz = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
    except nvml.NVMLError:
        return None
    factor = _MATRIX_FACTOR.get(capability, _DEFAULT_MATRIX_FACTOR)
    return float(round(2.0 * cores * clock_mhz * 1e6 * factor / 1e12, 1))


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _words(exc: Exception) -> str:
    return str(exc).strip() or type(exc).__name__
