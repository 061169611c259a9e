"""Samples memory while a server runs: NVML for cards, the kernel for the host, the server and local workers.

What cannot be seen (a remote worker, another vendor's card) is absent, never 0.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from placement.inputs.machine import Machine
from placement.units import MIB

if TYPE_CHECKING:
    from placement.measure.records.schema import DevicePeak, HostPeak

PERIOD_S = 0.2
_RESCAN = 10  # samples between looks for new children: that look reads every process of the machine


@dataclass
class Sample:
    """MiB now: by device what is taken and what the server itself takes of it; and the host's figures."""

    taken_mib: dict[str, float] = field(default_factory=dict)
    own_mib: dict[str, float] = field(default_factory=dict)
    rss_mib: float | None = None
    anonymous_mib: float | None = None
    available_mib: float | None = None
    swapped_out_mib: float | None = None


def load_nvml() -> Any | None:
    """Return pynvml with NVML running, or None where there is no NVIDIA driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def driver_version(nvml: Any | None) -> str | None:
    """Return the NVIDIA driver's version; None without one."""
    if nvml is None:
        return None
    with contextlib.suppress(nvml.NVMLError):
        return _text(nvml.nvmlSystemGetDriverVersion())
    return None


def memory_clock(machine: Machine, nvml: Any | None) -> str | None:
    """Return the highest memory clock of every card, as "CUDA0 10501 MHz"; None where NVML does not say."""
    clocks = []
    for name, handle in nvml_handles(machine, nvml).items():
        assert nvml is not None
        with contextlib.suppress(nvml.NVMLError):  # an old driver without this call
            clocks.append(f"{name} {nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)} MHz")
    return ", ".join(sorted(clocks)) or None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def nvml_handles(machine: Machine, nvml: Any | None) -> dict[str, Any]:
    """Return the NVML handle of each CUDA device of the machine: by UUID, else the next card of that name.

    NVML counts cards by bus, the engine by CUDA's order: the index alone means nothing.
    """
    if nvml is None:
        return {}
    free: list[tuple[str, str, Any]] = []
    with contextlib.suppress(nvml.NVMLError):
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            free.append(
                (_text(nvml.nvmlDeviceGetUUID(handle)), _text(nvml.nvmlDeviceGetName(handle)), handle)
            )
    found: dict[str, Any] = {}
    cuda = [device for device in machine.devices if device.is_cuda]
    for device in sorted(cuda, key=lambda each: each.uuid is None):
        match = next(
            (
                row
                for row in free
                if device.uuid == row[0] or (device.uuid is None and device.description == row[1])
            ),
            None,
        )
        if match is not None:
            free.remove(match)
            found[device.name] = match[2]
    return found


def worker_pids(machine: Machine) -> dict[str, int]:
    """Return the process of each RPC worker that runs on this host, by device name."""
    import psutil

    if not any(device.address for device in machine.devices):
        return {}
    ports: dict[int, int] = {}
    with contextlib.suppress(psutil.Error, OSError):
        for row in psutil.net_connections("tcp"):
            if row.status == psutil.CONN_LISTEN and row.pid and row.laddr:
                ports[row.laddr[1]] = row.pid
    found: dict[str, int] = {}
    for device in machine.devices:
        host, _, port = (device.address or "").rpartition(":")
        if host and port.isdigit() and int(port) in ports and _is_here(host):
            found[device.name] = ports[int(port)]
    return found


def _is_here(host: str) -> bool:
    try:
        address = socket.gethostbyname(host.strip("[]"))
        return ipaddress.ip_address(address).is_loopback or address == socket.gethostbyname(
            socket.gethostname()
        )
    except (OSError, ValueError):
        return False


class MemoryWatch:
    """Peaks of memory since the last `take`, sampled in a thread while the context lasts.

    The server is whatever child of this process was not there when the watch began; `on_server` is told its
    pid, `on_sample` every sample.
    """

    def __init__(
        self,
        machine: Machine,
        nvml: Any | None,
        on_server: Callable[[int], None] | None = None,
        on_sample: Callable[[Sample], None] | None = None,
        caps_mib: dict[str, float] | None = None,
    ) -> None:
        import psutil

        self._nvml, self._handles = nvml, nvml_handles(machine, nvml)
        self._workers = {
            name: psutil.Process(pid) for name, pid in worker_pids(machine).items() if psutil.pid_exists(pid)
        }
        self._totals = {device.name: device.total_mib for device in machine.devices}
        self._caps = caps_mib or {}
        self._me = psutil.Process()
        self._strangers = {child.pid for child in self._me.children(recursive=True)}
        self._servers: dict[int, Any] = {}
        self._n_samples = 0
        self._on_server, self._on_sample = on_server, on_sample
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="memory")
        self._before = self._sample()
        self._peak = self._before

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._end.wait(PERIOD_S):
            self._step()

    def _step(self) -> None:
        with self._lock:
            sample = self._sample()
            self._peak = _most(self._peak, sample)
        if self._on_sample is not None:
            self._on_sample(sample)

    def _children(self) -> list[Any]:
        """The server and what it started: looked for until there is one, and now and then after that."""
        import psutil

        alive = [child for child in self._servers.values() if child.is_running()]
        self._n_samples += 1
        if alive and self._n_samples % _RESCAN:
            return alive
        with contextlib.suppress(psutil.Error):
            for child in self._me.children(recursive=True):
                if child.pid not in self._strangers and child.pid not in self._servers:
                    self._servers[child.pid] = child
                    alive.append(child)
                    if self._on_server is not None:
                        self._on_server(child.pid)
        return alive

    def _sample(self) -> Sample:
        import psutil

        sample = Sample()
        children = self._children()
        for name, handle in self._handles.items():
            self._read_card(sample, name, handle, {child.pid for child in children})
        for name, worker in self._workers.items():
            with contextlib.suppress(psutil.Error):
                sample.taken_mib[name] = sample.own_mib[name] = worker.memory_info().rss / MIB
        for child in children:
            with contextlib.suppress(psutil.Error):
                info = child.memory_info()
                sample.rss_mib = (sample.rss_mib or 0.0) + info.rss / MIB
                private = info.rss - getattr(info, "shared", 0)
                sample.anonymous_mib = (sample.anonymous_mib or 0.0) + private / MIB
        sample.available_mib = psutil.virtual_memory().available / MIB
        with contextlib.suppress(Exception):  # some containers hide it
            sample.swapped_out_mib = psutil.swap_memory().sout / MIB
        return sample

    def _read_card(self, sample: Sample, name: str, handle: Any, pids: set[int]) -> None:
        nvml = self._nvml
        assert nvml is not None
        with contextlib.suppress(nvml.NVMLError):
            sample.taken_mib[name] = nvml.nvmlDeviceGetMemoryInfo(handle).used / MIB
        with contextlib.suppress(nvml.NVMLError):
            own = [
                process.usedGpuMemory
                for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)
                if process.pid in pids and process.usedGpuMemory is not None
            ]
            if own:
                sample.own_mib[name] = sum(own) / MIB

    def take(self) -> tuple[dict[str, DevicePeak], HostPeak]:
        """Return the peaks since the last call, and begin anew."""
        from placement.measure.records.schema import DevicePeak, HostPeak

        self._step()
        with self._lock:
            peak, self._peak = self._peak, Sample()
        devices = {
            name: DevicePeak(
                peak_mib=round(taken, 1),
                own_mib=_rounded(peak.own_mib.get(name)),
                before_mib=_rounded(self._before.taken_mib.get(name)),
                total_mib=self._totals.get(name),
                cap_mib=_rounded(self._caps.get(name)),
            )
            for name, taken in peak.taken_mib.items()
        }
        return devices, HostPeak(
            rss_mib=_rounded(peak.rss_mib),
            anonymous_mib=_rounded(peak.anonymous_mib),
            least_available_mib=_rounded(peak.available_mib),
            swapped_mib=_rounded(self._swapped(peak)),
        )

    def _swapped(self, peak: Sample) -> float | None:
        if peak.swapped_out_mib is None or self._before.swapped_out_mib is None:
            return None
        return peak.swapped_out_mib - self._before.swapped_out_mib


def _most(peak: Sample, sample: Sample) -> Sample:
    """The worst of both: the most taken, the least available."""

    def larger(one: float | None, two: float | None) -> float | None:
        return two if one is None else one if two is None else max(one, two)

    def smaller(one: float | None, two: float | None) -> float | None:
        return two if one is None else one if two is None else min(one, two)

    names = {**peak.taken_mib, **sample.taken_mib}
    own = {**peak.own_mib, **sample.own_mib}
    return Sample(
        {n: max(peak.taken_mib.get(n, 0.0), sample.taken_mib.get(n, 0.0)) for n in names},
        {n: max(peak.own_mib.get(n, 0.0), sample.own_mib.get(n, 0.0)) for n in own},
        larger(peak.rss_mib, sample.rss_mib),
        larger(peak.anonymous_mib, sample.anonymous_mib),
        smaller(peak.available_mib, sample.available_mib),
        larger(peak.swapped_out_mib, sample.swapped_out_mib),
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
