"""Reads what llama.cpp prints: memory breakdowns, splits and caches of a plan, and the buffers of a run.

Knows the formats of current builds and of those since 2024 (engine.md 3.1). Works on plain log lines and on
those of `--log-jsonl` alike; the machine-readable breakdown is preferred where there is one. Whatever a log
does not say is None or empty, never 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from placement.inputs.problem import CPU, HOST

_DEVICE_ROW = re.compile(
    r"\|\s+- (?P<name>\S+)[^|]*\|\s*\d+ =\s*-?\d+ \+ \(\s*(?P<self>\d+) =\s*(?P<model>\d+)"
    r" \+\s*(?P<context>\d+) \+\s*(?P<compute>\d+)\) \+\s*-?\d+ \|"
)
_HOST_ROW = re.compile(
    r"\|\s+- (?P<name>\S+)\s*\|\s*(?P<self>\d+) =\s*(?P<model>\d+) \+\s*(?P<context>\d+)"
    r" \+\s*(?P<compute>\d+)\s*\|"
)
_FITP_ROW = re.compile(
    r"^(?P<name>[A-Za-z]\S*) (?P<model>\d+) (?P<context>\d+) (?P<compute>\d+) ?$", re.MULTILINE
)
_BREAKDOWN_JSON = re.compile(r'^\{"type":\s*"fit_memory_breakdown".*$', re.MULTILINE)
_TABLE_HEAD = "| memory breakdown [MiB]"
_SPLITS = re.compile(r"splits\s*=\s*(\d+)(?:\s*/\s*(\d+)|\s*\(with bs=\d+\),\s*(\d+)\s*\(with bs=1\))?")
_NODES = re.compile(r"nodes\s*=\s*(\d+)(?:\s*/\s*(\d+))?")
_COPIES = re.compile(r"sched copies = (\d+)|pipeline parallelism enabled \(n_copies=(\d+)\)")
_KV_SIZE = re.compile(
    r"llama_kv_cache(?!_recurrent)\w*: size =\s*([\d.]+) MiB|: KV self size\s*=\s*([\d.]+) MiB"
)
_RS_SIZE = re.compile(r"llama_(?:memory|kv_cache)_recurrent: size =\s*([\d.]+) MiB")
_FA_NOW = re.compile(r"Flash Attention (?:was auto, set to |not supported, set to )?(enabled|disabled)")
_FA_SETTING = re.compile(r"flash_attn\s*=\s*(enabled|disabled|0|1)\b")
_BUFFER = re.compile(
    r"(?P<said>load_tensors)?: +(?P<name>[^\s:]\S*) +(?P<what>model |KV |RS |compute |)"
    r"buffer size =\s*(?P<mib>[\d.]+) MiB"
)
_PLAIN_HOST_BUFFER = re.compile(r"CPU|CPU_Mapped|\w+_Host")
_DEVICE_USED = re.compile(r"using device (\S+) \((.*?)\)")
_LOAD_BEGINS = "loading model tensors, this can take a while"
_PROJECTED = re.compile(r"projected to use (\d+) MiB of device memory")
_EXTRA_MODEL = "device memory data for the extra model"
_CONFIG_FILE = re.compile(r"using config file: ([^\n\"\\]+)")
_GPU_BUFFER = re.compile(r"(?:CUDA|ROCm|HIP|MUSA|Vulkan|SYCL|Metal|MTL|OpenCL|CANN|RPC|WebGPU)\d*\b")


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """MiB that the engine takes on one device, each rounded down by the engine; `total_mib` is of the sum."""

    weights_mib: float
    context_mib: float
    compute_mib: float
    total_mib: float

    def __add__(self, other: EngineMemory) -> EngineMemory:
        return EngineMemory(
            self.weights_mib + other.weights_mib,
            self.context_mib + other.context_mib,
            self.compute_mib + other.compute_mib,
            self.total_mib + other.total_mib,
        )


@dataclass(frozen=True, slots=True)
class PlanReading:
    """What a plan's log says; `extra_buffers` (CPU_REPACK, AMX …) are part of `devices["Host"]` as well."""

    devices: dict[str, EngineMemory]
    extra_buffers: dict[str, EngineMemory] = field(default_factory=dict)
    splits_prompt: int | None = None
    splits_decode: int | None = None
    nodes_prompt: int | None = None
    nodes_decode: int | None = None
    n_copies: int | None = None
    fa_enabled: bool | None = None
    kv_mib: tuple[float, ...] = ()
    rs_mib: tuple[float, ...] = ()
    config_files: tuple[str, ...] = ()


Row = tuple[str, EngineMemory]


def _memory(values: dict[str, object]) -> EngineMemory:
    model, context, compute = (float(str(values[key])) for key in ("model", "context", "compute"))
    total = values.get("self")
    return EngineMemory(
        model, context, compute, float(str(total)) if total is not None else model + context + compute
    )


def _breakdowns(text: str) -> Iterator[tuple[int, list[Row]]]:
    """Each breakdown's end in the text and its rows: from JSON if there is any, else from tables."""
    matches = list(_BREAKDOWN_JSON.finditer(text))
    for match in matches:
        try:
            data = json.loads(match.group())["data"]["rows"]
            rows = [(str(row["name"]), _memory(row)) for row in data]
        except (ValueError, KeyError, TypeError):
            continue  # cut off by the end of the process
        if _has_host(rows):
            yield match.end(), rows
    if matches:
        return
    start = text.find(_TABLE_HEAD)
    while start >= 0:
        following = text.find(_TABLE_HEAD, start + 1)
        end, rows = _table(text, start, following if following >= 0 else len(text))
        if _has_host(rows):
            yield end, rows
        start = following


def _has_host(rows: list[Row]) -> bool:
    """Every whole breakdown has a row for the host."""
    return any(name == HOST for name, _ in rows)


def _table(text: str, start: int, limit: int) -> tuple[int, list[Row]]:
    rows: list[Row] = []
    end = text.find("\n", start)
    while 0 <= end < limit:
        line_end = text.find("\n", end + 1)
        line = text[end + 1 : line_end if line_end >= 0 else limit]
        match = _DEVICE_ROW.search(line) or _HOST_ROW.search(line)
        if match is None:
            break
        rows.append((match["name"], _memory(match.groupdict())))
        end = line_end
    return (end if end >= 0 else limit), rows


def read_plan(text: str) -> PlanReading | None:
    """Read the last measurement of a log; None if there is no breakdown in it.

    With a draft model or MTP layers llama-server measures that one too: its memory is added.
    """
    found = list(_breakdowns(text))
    if not found:
        rows = [(match["name"], _memory(match.groupdict())) for match in _FITP_ROW.finditer(text)]
        return _reading(text, rows) if _has_host(rows) else None
    extra_from = text.find(_EXTRA_MODEL)
    main = [item for item in found if extra_from < 0 or item[0] < extra_from] or found[:1]
    begins = [0, *(end for end, _ in found)]
    end, rows = main[-1]
    if found[-1][0] > end:
        rows = rows + _extra(rows, found[-1][1], text)
    return _reading(text[begins[found.index(main[-1])] : end], rows, whole=text)


def is_whole(text: str, reading: PlanReading) -> bool:
    """Whether a plan's log has everything: llama-fit-params loses its last lines if it exits too soon."""
    return reading.splits_decode is not None and has_all_buffers(text, reading)


def has_all_buffers(text: str, reading: PlanReading) -> bool:
    """Whether the breakdown has a row for each of the host's special buffers that the log names before."""
    buffers = {match["name"] for match in _BUFFER.finditer(text) if match["what"] == "model "}
    special = {name for name in buffers if _home(name) == HOST and not _PLAIN_HOST_BUFFER.fullmatch(name)}
    return special <= set(reading.extra_buffers)


def _extra(rows: list[Row], extra: list[Row], text: str) -> list[Row]:
    """The extra model's rows; without its weights if the engine's own sum has them once (MTP layers)."""
    projected = _PROJECTED.search(text)
    total = sum(memory.total_mib for name, memory in [*rows, *extra] if _GPU_BUFFER.match(name))
    weights = sum(memory.weights_mib for name, memory in extra if _GPU_BUFFER.match(name))
    if projected is None or abs(total - float(projected[1])) <= abs(total - weights - float(projected[1])):
        return extra
    return [
        (
            name,
            EngineMemory(0.0, memory.context_mib, memory.compute_mib, memory.total_mib - memory.weights_mib),
        )
        for name, memory in extra
    ]


def _reading(text: str, rows: list[Row], whole: str | None = None) -> PlanReading:
    devices: dict[str, EngineMemory] = {}
    extra: dict[str, EngineMemory] = {}
    for name, memory in rows:
        is_extra = name != HOST and (name.startswith(CPU) or _GPU_BUFFER.match(name) is None)
        for table, key in ((devices, HOST if is_extra else name), *(((extra, name),) if is_extra else ())):
            table[key] = table[key] + memory if key in table else memory
    splits_prompt, splits_decode = _pair(_SPLITS, text)
    nodes_prompt, nodes_decode = _pair(_NODES, text)
    copies = _last(_COPIES, text)
    return PlanReading(
        devices=devices,
        extra_buffers=extra,
        splits_prompt=splits_prompt,
        splits_decode=splits_decode,
        nodes_prompt=nodes_prompt,
        nodes_decode=nodes_decode,
        n_copies=int(copies) if copies else None,
        fa_enabled=_flash_attention(text),
        kv_mib=tuple(float(next(filter(None, m.groups()))) for m in _KV_SIZE.finditer(text)),
        rs_mib=tuple(float(m.group(1)) for m in _RS_SIZE.finditer(text)),
        config_files=tuple(_CONFIG_FILE.findall(whole if whole is not None else text)),
    )


def read_run(text: str) -> PlanReading | None:
    """Read the buffers that a run has allocated, from its last load on; None if it allocated none.

    Host is all memory of the host: CPU, CPU_Mapped (a range of the file, not what is resident), CUDA_Host,
    CPU_REPACK. Output buffers, which the engine counts nowhere, are left out.
    """
    begins = max(text.rfind(_LOAD_BEGINS), 0)
    names = _buffer_devices(text)
    sums: dict[str, list[float]] = {}
    for match in _BUFFER.finditer(text, begins):
        what = match["what"].strip() or ("model" if match["said"] else "")
        column = {"model": 0, "KV": 1, "RS": 1, "compute": 2}.get(what)
        if column is not None:
            row = sums.setdefault(names.get(match["name"]) or _home(match["name"]), [0.0, 0.0, 0.0])
            row[column] += float(match["mib"])
    if not sums:
        return None
    rows = [(name, EngineMemory(row[0], row[1], row[2], sum(row))) for name, row in sums.items()]
    return _reading(text[begins:], rows, whole=text)


def _home(buffer: str) -> str:
    return buffer if _GPU_BUFFER.match(buffer) and not buffer.endswith("_Host") else HOST


def _buffer_devices(text: str) -> dict[str, str]:
    """Buffer type to device for RPC workers: `RPC0[host:port]` is the first device of that worker."""
    seen: dict[str, list[str]] = {}
    for name, description in _DEVICE_USED.findall(text):
        if name.startswith("RPC") and name not in seen.setdefault(description, []):
            seen[description].append(name)
    return {
        f"RPC{index}[{endpoint}]": name
        for endpoint, names in seen.items()
        for index, name in enumerate(names)
    }


def _pair(pattern: re.Pattern[str], text: str) -> tuple[int | None, int | None]:
    """(prompt, decode) of the last match; one number stands for both."""
    matches = list(pattern.finditer(text))
    if not matches:
        return None, None
    first, *rest = matches[-1].groups()
    second = next((value for value in rest if value), first)
    return int(first), int(second)


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    values = [next((group for group in match.groups() if group), None) for match in pattern.finditer(text)]
    return values[-1] if values else None


def _flash_attention(text: str) -> bool | None:
    value = _last(_FA_NOW, text) or _last(_FA_SETTING, text)
    return None if value is None else value in ("enabled", "1")
