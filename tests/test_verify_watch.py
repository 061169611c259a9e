"""Memory is sampled where it can be seen, and absent elsewhere."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

from verify_support import cluster, cpu_machine

from placement.inputs.machine import Cpu, Device, Machine
from placement.measure.verify.watch import MemoryWatch, driver_version, nvml_handles, worker_pids
from placement.units import MIB

NAMES = {"bus1": "NVIDIA GeForce RTX 5070 Ti", "bus2": "NVIDIA GeForce RTX 4090"}


def fake_nvml(used_mib: dict[str, int], processes: dict[str, list[tuple[int, int]]] | None = None) -> Any:
    """NVML with two cards in bus order, which is not CUDA's."""
    running = processes or {}
    return SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: ["bus1", "bus2"][index],
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}",
        nvmlDeviceGetName=lambda handle: NAMES[handle].encode(),
        nvmlSystemGetDriverVersion=lambda: b"595.1",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=used_mib[handle] * MIB),
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [
            SimpleNamespace(pid=pid, usedGpuMemory=mib * MIB) for pid, mib in running.get(handle, [])
        ],
    )


def cards(**uuids: str) -> Machine:
    devices = (
        Device("CUDA0", 24576, 24000, 480, 1008, 25, NAMES["bus2"], uuid=uuids.get("CUDA0")),
        Device("CUDA1", 16384, 12800, 480, 896, 25, NAMES["bus1"], uuid=uuids.get("CUDA1")),
    )
    return Machine("cards", devices, Cpu(60000, 50, 16))


def test_cards_are_matched_by_uuid() -> None:
    """The UUID decides which NVML card a device is, whatever the order and the names."""
    result = nvml_handles(cards(CUDA0="GPU-bus1", CUDA1="GPU-bus2"), fake_nvml({}))
    assert result == {"CUDA0": "bus1", "CUDA1": "bus2"}


def test_cards_are_matched_by_name() -> None:
    """Without UUIDs the name decides: CUDA's first card may be NVML's second."""
    assert nvml_handles(cards(), fake_nvml({})) == {"CUDA0": "bus2", "CUDA1": "bus1"}


def test_no_driver_is_no_card() -> None:
    """Without NVML there are no handles and no driver version."""
    assert nvml_handles(cards(), None) == {}
    assert driver_version(None) is None
    assert driver_version(fake_nvml({})) == "595.1"


def test_peak_is_kept_between_takes() -> None:
    """A peak that has gone again is in the next take, and not in the one after."""
    used = {"bus1": 100, "bus2": 200}
    watch = MemoryWatch(cards(), fake_nvml(used), caps_mib={"CUDA0": 23520})
    used["bus2"] = 900
    watch._step()
    used["bus2"] = 300
    devices, _ = watch.take()
    assert (devices["CUDA0"].before_mib, devices["CUDA0"].peak_mib, devices["CUDA0"].cap_mib) == (
        200,
        900,
        23520,
    )
    assert watch.take()[0]["CUDA0"].peak_mib == 300


def test_own_memory_is_that_of_our_children() -> None:
    """The server's own memory on a card is what the processes that we started take, not the desktop's."""
    running: dict[str, list[tuple[int, int]]] = {"bus2": [(1, 5000)]}
    seen: list[int] = []
    watch = MemoryWatch(cards(), fake_nvml({"bus1": 0, "bus2": 6000}, running), on_server=seen.append)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    try:
        running["bus2"].append((child.pid, 700))
        devices, host = watch.take()
        assert devices["CUDA0"].own_mib == 700
        assert seen == [child.pid]
        assert host.rss_mib is not None and host.rss_mib > 0
    finally:
        child.kill()
        child.wait()


def test_cpu_machine_has_the_host_only() -> None:
    """A machine without GPUs has no devices, and the host's memory is known."""
    with MemoryWatch(cpu_machine(), None) as watch:
        time.sleep(0.25)
        devices, host = watch.take()
    assert devices == {}
    assert host.least_available_mib is not None and host.rss_mib is None


def test_local_worker_is_found_by_its_port() -> None:
    """The process that listens on a worker's port is the worker; a port where none listens is nobody's."""
    code = (
        "import socket, time; s = socket.create_server(('127.0.0.1', 0)); "
        "print(s.getsockname()[1], flush=True); time.sleep(30)"
    )
    with socket.create_server(("127.0.0.1", 0)) as closed:
        unused = closed.getsockname()[1]
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None
        port = worker.stdout.readline().strip()
        machine = cluster(f"127.0.0.1:{port}", f"127.0.0.1:{unused}", f"192.0.2.1:{port}")
        assert worker_pids(machine) == {"RPC0": worker.pid}
    finally:
        worker.kill()
        worker.wait()
        assert worker.stdout is not None
        worker.stdout.close()
