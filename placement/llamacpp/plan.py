"""What the engine reserves for a placement beside weights and context: compute buffers, splits and nodes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ComputePlan:
    """Compute-buffer bytes by device ("Host" included), splits and nodes of the prompt and decode graphs.

    `is_exact` is False where no rule covers the architecture and the figures are a coarse estimate.
    """

    compute_bytes: dict[str, int]
    splits_prompt: int
    splits_decode: int
    n_nodes_prompt: int
    n_nodes_decode: int
    n_copies: int
    is_exact: bool
    notes: tuple[str, ...]
