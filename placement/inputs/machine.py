"""`Machine`: devices with their caps, bandwidths and links, and the measured cost coefficients; from TOML and back."""

from __future__ import annotations

from dataclasses import dataclass, field

DEFAULT_RUNTIME_MIB = 480.0  # a CUDA context with its library workspaces, outside the engine's own figures
DEFAULT_LINK_GB_PER_S = 25.0  # PCIe 4.0 x16 as measured

CUDA, RPC = "CUDA", "RPC"
MIRRORED_BACKENDS = frozenset({CUDA, RPC})  # whose rules memory and splits follow; the CPU's are mirrored too
UNNUMBERED_DEVICES = frozenset({"BLAS", "GPUOpenCL", "Metal", "WebGPU", "ZenDNN"})  # names without an index
# Backends that are known by another name than their devices (GGML_*_NAME of ggml's headers and sources).
_BACKEND_NAMES = {"MTL": "Metal", "GPUOpenCL": "OpenCL", "HTP": "Hexagon", "OPENVINO": "OpenVINO"}


def backend_of(device_name: str) -> str:
    """llama.cpp's backend of a device by its name: "CUDA0" is of CUDA, "MTL0" of Metal, "ROCm1" of ROCm.

    What lies behind an RPC device is not known: its backend is RPC.
    """
    prefix = device_name.rstrip("0123456789")
    return _BACKEND_NAMES.get(prefix, prefix)


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU (or RPC worker) as the engine names it; memory in MiB, bandwidths in 1e9 bytes per second."""

    name: str
    total_mib: float
    usable_mib: float  # all that the engine may take, its runtime included
    runtime_mib: float
    bandwidth_gb_per_s: float
    link_gb_per_s: float
    description: str = ""
    address: str | None = None  # "host:port" of an RPC worker
    uuid: str | None = None
    compute_capability: str | None = None  # "8.9"
    tflops: float | None = None  # dense half-precision matrix throughput, for prompts

    @property
    def backend(self) -> str:
        """The llama.cpp backend that runs the device, by its name."""
        return backend_of(self.name)

    @property
    def is_mirrored(self) -> bool:
        """Whether memory and splits follow its backend's own rules; of any other they are a coarse estimate."""
        return self.backend in MIRRORED_BACKENDS

    @property
    def is_rpc(self) -> bool:
        """Whether the device is a remote worker: no operation offload, no CUDA padding."""
        return self.backend == RPC

    @property
    def is_cuda(self) -> bool:
        """Whether the CUDA backend's rules hold (row padding, op offload, pinned host memory)."""
        return self.backend == CUDA

    @property
    def engine_name(self) -> str:
        """The name that `-dev` and `-ot` take: "CUDA0", or "RPC0[host:port]"."""
        return f"{self.name}[{self.address}]" if self.address else self.name


@dataclass(frozen=True, slots=True)
class Cpu:
    """The host: what the engine may take of its memory, and how fast it reads it."""

    usable_mib: float
    bandwidth_gb_per_s: float
    threads: int
    description: str = ""


@dataclass(frozen=True, slots=True)
class Coefficient:
    """One cost coefficient: `source` is default, detected or calibrated; unknown uncertainty is None."""

    value: float
    unit: str
    source: str = "default"
    date: str | None = None
    n_samples: int | None = None
    uncertainty: float | None = None


@dataclass(frozen=True, slots=True)
class Past:
    """What a coefficient was before `until` (an ISO date and time), when another value took its place."""

    name: str
    coefficient: Coefficient
    until: str


@dataclass(frozen=True)
class Machine:
    """Devices in the engine's order, the host, coefficients by name, and what these were before, oldest first."""

    name: str
    devices: tuple[Device, ...]
    cpu: Cpu
    coefficients: dict[str, Coefficient] = field(default_factory=dict)
    history: tuple[Past, ...] = ()

    def device(self, name: str) -> Device:
        """The device of that name.

        Raises:
            KeyError: the machine has none.
        """
        for device in self.devices:
            if device.name == name:
                return device
        raise KeyError(name)


def margin_mib(machine: Machine, device: str) -> float | None:
    """MiB to keep free on a device beside its runtime, as learned from runs; None where nothing was learned."""
    kept = machine.coefficients.get(f"margin_mib.{device}")
    return kept.value if kept is not None else None
