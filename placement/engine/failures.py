"""Names the failure that a llama.cpp log tells of, and finds the line that says so.

The engine writes its log from a thread of its own: when it aborts, the last lines may be missing, and then a
CUDA error that was an allocation can be told only from the memory that was free.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run failed: `kind` is one of FAILURE_KINDS, `line` the log line that says so.

    "gpu-error" is an abort in the GPU backend whose reason was lost: often an allocation that failed.
    """

    kind: str
    line: str


_OUT_OF_MEMORY = (
    r"out of memory|failed to allocate .*buffer|unable to allocate .*buffer|cudaMalloc failed"
    r"|failed to allocate compute|std::bad_alloc|OutOfDeviceMemory|failed to allocate buffer for kv cache"
)
_FAILURES = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        (
            "bad-argument",
            r"invalid argument:|unknown argument|error while handling argument|unknown buffer type",
        ),
        ("port-taken", r"couldn't bind|address already in use|failed to bind"),
        ("out-of-memory", _OUT_OF_MEMORY),
        ("rpc", r"Failed to connect to|RPC (?:handshake|transport|server)\b.*fail|Remote RPC server crashed"),
        (
            "bad-model",
            r"error loading model|failed to load model|failed to open GGUF|invalid magic|unknown model arch",
        ),
        (
            "bad-setting",
            r"requires flash_attn|failed to initialize the context|failed to create (?:llama_)?context",
        ),
        ("abort", r"(?:CUDA|ROCm|MUSA) error: "),
        ("gpu-error", r"\.cuh?:\d+: (?:CUDA|ROCm|MUSA) error$"),
        ("abort", r"GGML_ASSERT|terminate called|Segmentation fault|GGML_ABORT"),
        ("error", r"^(?:error|fatal|\S* ?E )|\berror:|what\(\):"),
    )
)
FAILURE_KINDS = tuple(dict.fromkeys(kind for kind, _ in _FAILURES))
_PREFIX = re.compile(r"^\d+\.\d\d\.\d{3}\.\d{3} [A-Z] ")


def classify_failure(text: str) -> Failure | None:
    """Name the failure that a log tells of: the first line of the kind that stands first in FAILURE_KINDS."""
    lines = [_plain(line) for line in text.splitlines() if line.strip()]
    for kind, pattern in _FAILURES:
        for line in lines:
            if pattern.search(line):
                return Failure(kind, line)
    return None


def last_line(text: str) -> str:
    """Return the last line that is not empty, without the log's prefix; "" if there is none."""
    lines = [line for line in text[-8192:].splitlines() if line.strip()]
    return _plain(lines[-1]) if lines else ""


def _plain(line: str) -> str:
    if line.startswith('{"type":"log"'):
        try:
            line = str(json.loads(line)["msg"])
        except (ValueError, KeyError):
            return line.strip()
    return _PREFIX.sub("", line.strip()).strip()
