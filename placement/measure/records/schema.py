"""The lines of `runs.jsonl` as pydantic records; imported by who writes or reads them, and by nobody else."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from placement.inputs.identity import MachineIdentity


class _Base(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Key(_Base):
    """What a measurement depends on besides the arguments; runs under different keys are never mixed."""

    engine_build: str
    engine_fingerprint: str
    model_digest: str
    machine: MachineIdentity | str  # "NAME/DIGEST" in old records
    driver: str | None = None  # the NVIDIA driver's version; None without one
    memory_clock: str | None = None  # "CUDA0 10501 MHz": what the cards may reach now; None where unknown
    plan: str  # what is asked of the server: prompt lengths, depth, seed


class Predicted(_Base):
    """What was predicted before the run, and how it is known: "estimated" or "planned"."""

    label: str
    self_mib: dict[str, float]
    splits_decode: int | None = None
    decode_tps: float | None = None
    prompt_tps: float | None = None
    turn_s: float | None = None


class DevicePeak(_Base):
    """MiB on one device over a phase: all that is taken, the server's own part, and what was before."""

    peak_mib: float
    own_mib: float | None = None
    before_mib: float | None = None
    total_mib: float | None = None
    cap_mib: float | None = None


class HostPeak(_Base):
    """MiB of the host over a phase; `swapped_mib` was written to swap meanwhile, by anyone."""

    rss_mib: float | None = None
    anonymous_mib: float | None = None
    least_available_mib: float | None = None
    swapped_mib: float | None = None


class Timing(_Base):
    """The server's own timings of one request."""

    n_prompt: int
    prompt_s: float
    n_generated: int
    generate_s: float


class Record(_Base):
    """One finished phase of one candidate in one round."""

    format: int = 1
    campaign: str
    at: str  # ISO 8601, UTC
    key: Key
    round: int  # from 1
    candidate: str
    role: str  # "solution" or "fit"
    run_id: str  # the same for every phase of a candidate, over rounds and reruns
    arguments: tuple[str, ...]
    phase: str
    repeat: int = 0
    outcome: str
    detail: str = ""
    log_tail: tuple[str, ...] = ()
    log: str = ""
    wall_s: float
    timing: Timing | None = None
    devices: dict[str, DevicePeak] | None = None
    host: HostPeak | None = None
    buffers_mib: dict[str, float] | None = None
    splits_prompt: int | None = None
    splits_decode: int | None = None
    predicted: Predicted | None = None
    n_host_layers: int | None = None
    fit_arguments: tuple[str, ...] | None = None  # what --fit chose, as llama-fit-params says it
    model_file: str | None = None  # as it was found by whoever ran it
    solved_digest: str | None = (
        None  # of the description that was solved for: laid out alike, named otherwise
    )
