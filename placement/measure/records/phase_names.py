"""The phases of a round, as run records name them."""

from __future__ import annotations

PLAN, START, WARM_UP, SHORT, LONG, CANARY, STOP = (
    "plan", "start", "warm-up", "short prompt", "long prompt", "canary", "stop",
)  # fmt: skip
