from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from placement.inputs.detect import bandwidth_gb_per_s, detect_cpu, detect_hardware, link_gb_per_s
from placement.inputs.machine import Device
from placement.inputs.machine_files import machine_toml, read_machine

MIB = 1 << 20


class NVMLError(Exception):
    """As pynvml's."""


CARDS: list[dict[str, Any]] = [
    {
        "Name": b"NVIDIA GeForce RTX 4090",
        "UUID": "GPU-1",
        "MemoryInfo": SimpleNamespace(total=24564 * MIB, free=24000 * MIB),
        "CudaComputeCapability": (8, 9),
        "clocks": {"mem": 10501, "sm": 2520},
        "MemoryBusWidth": 384,
        "MaxPcieLinkGeneration": 4,
        "MaxPcieLinkWidth": 16,
        "NumGpuCores": 16384,
    },
    {
        "Name": "NVIDIA H200",
        "UUID": b"GPU-2",
        "MemoryInfo": SimpleNamespace(total=143771 * MIB, free=140000 * MIB),
        "CudaComputeCapability": (9, 0),
        "clocks": {"mem": 3201, "sm": 1980},
        "MemoryBusWidth": 6144,
        "MaxPcieLinkGeneration": 5,
        "MaxPcieLinkWidth": 16,
        "NumGpuCores": 16896,
    },
]


class FakeNvml(SimpleNamespace):
    """A pynvml of these cards; the functions named in `failing` raise."""

    NVMLError = NVMLError
    NVML_CLOCK_MEM, NVML_CLOCK_SM = "mem", "sm"

    def __init__(self, cards: list[dict[str, Any]], failing: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.is_shut = False
        answers = {
            "Init": lambda: None,
            "Shutdown": lambda: setattr(self, "is_shut", True),
            "DeviceGetCount": lambda: len(cards),
            "DeviceGetHandleByIndex": lambda index: cards[index],
            "DeviceGetMaxClockInfo": lambda card, kind: card["clocks"][kind],
            **{
                f"DeviceGet{name}": (lambda card, name=name: card[name])
                for name in CARDS[0]
                if name != "clocks"
            },
        }
        for name, answer in answers.items():
            setattr(self, f"nvml{name}", self._failing(name) if name in failing else answer)

    @staticmethod
    def _failing(name: str) -> Any:
        def fail(*_: object) -> None:
            raise NVMLError(f"{name}: not supported")

        return fail


def use(monkeypatch: pytest.MonkeyPatch, *failing: str, cards: list[dict[str, Any]] = CARDS) -> FakeNvml:
    """Put a fake NVML in the place of the real one."""
    fake = FakeNvml(cards, failing)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value of a card comes from NVML: memory in MiB, bandwidth from clock and width, link from PCIe."""
    use(monkeypatch)
    machine, reason = detect_hardware()
    assert machine is not None
    assert reason == ""
    assert machine.devices[0] == Device(
        name="CUDA0",
        description="NVIDIA GeForce RTX 4090",
        uuid="GPU-1",
        compute_capability="8.9",
        total_mib=24564.0,
        usable_mib=24000.0,
        runtime_mib=480.0,
        bandwidth_gb_per_s=1008.1,
        link_gb_per_s=25.6,
        tflops=165.2,
    )


def test_data_centre_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of an H200: 4.9 TB/s by its clock and width."""
    use(monkeypatch)
    machine, _ = detect_hardware()
    assert machine is not None
    assert machine.devices[1].bandwidth_gb_per_s == 4916.7
    assert machine.devices[1].uuid == "GPU-2"


def test_detected_machine_can_be_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """What is detected is a valid machine file."""
    use(monkeypatch)
    machine, _ = detect_hardware()
    assert machine is not None
    (tmp_path / "m.toml").write_text(machine_toml(machine))
    assert machine == read_machine(tmp_path / "m.toml")


def test_full_card_is_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """A card without a free byte still makes a valid machine file."""
    full = {**CARDS[0], "MemoryInfo": SimpleNamespace(total=24564 * MIB, free=0)}
    use(monkeypatch, cards=[full])
    machine, _ = detect_hardware()
    assert machine is not None
    (tmp_path / "m.toml").write_text(machine_toml(machine))
    assert read_machine(tmp_path / "m.toml").devices[0].usable_mib > 0


def test_unknown_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that does not count cores leaves the throughput unknown."""
    use(monkeypatch, "DeviceGetNumGpuCores")
    machine, _ = detect_hardware()
    assert machine is not None
    assert machine.devices[0].tflops is None


@pytest.mark.parametrize(
    ("failing", "reason"),
    [
        ("Init", "no NVIDIA driver (Init: not supported)"),
        ("DeviceGetCount", "NVML failed (DeviceGetCount: not supported)"),
        ("DeviceGetMemoryInfo", "NVML failed (DeviceGetMemoryInfo: not supported)"),
        ("DeviceGetName", "NVML failed (DeviceGetName: not supported)"),
    ],
)
def test_nvml_errors(failing: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of NVML is a reason in words, not an exception."""
    use(monkeypatch, failing)
    assert (None, reason) == detect_hardware()


@pytest.mark.parametrize("failing", ["DeviceGetMaxPcieLinkGeneration", "DeviceGetMaxPcieLinkWidth"])
def test_unknown_link(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that does not tell its link has the default one."""
    use(monkeypatch, failing)
    machine, _ = detect_hardware()
    assert machine is not None
    assert machine.devices[0].link_gb_per_s == 25.0


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver without a GPU is no machine."""
    use(monkeypatch, cards=[])
    assert detect_hardware() == (None, "the NVIDIA driver reports no GPU")


def test_no_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing bindings are a reason too."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert detect_hardware() == (None, "the NVML bindings are not installed")


@pytest.mark.parametrize("failing", [(), ("DeviceGetCount",), ("Shutdown",)])
def test_nvml_is_shut_down(failing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML is closed whatever happens, and its closing cannot fail a detection."""
    fake = use(monkeypatch, *failing)
    machine, _ = detect_hardware()
    assert fake.is_shut is not ("Shutdown" in failing)
    assert (machine is None) is ("DeviceGetCount" in failing)


@pytest.mark.parametrize(
    ("clock_mhz", "bits", "expected"), [(10501, 384, 1008.1), (14001, 256, 896.1), (9751, 384, 936.1)]
)
def test_bandwidth(clock_mhz: int, bits: int, expected: float) -> None:
    """Two transfers a clock: RTX 4090, 5070 Ti and 3090."""
    assert expected == bandwidth_gb_per_s(clock_mhz, bits)


@pytest.mark.parametrize(
    ("generation", "width", "expected"), [(3, 16, 12.8), (4, 8, 12.8), (5, 16, 51.2), (9, 1, 6.4)]
)
def test_link(generation: int, width: int, expected: float) -> None:
    """A link is what copies reach: half as much a generation; one too new counts as the newest known."""
    assert expected == link_gb_per_s(generation, width)


def test_cpu() -> None:
    """The host here has threads, a bandwidth within the cautious range, and less memory than all of it."""
    import psutil

    cpu = detect_cpu()
    assert cpu.threads >= 1
    assert 20 <= cpu.bandwidth_gb_per_s <= 50
    assert 0 < cpu.usable_mib < psutil.virtual_memory().total / MIB
