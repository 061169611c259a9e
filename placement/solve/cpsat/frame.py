"""`Frame`: one placement question in whole numbers, all that the solver sees of a model and a machine.

A frame fixes the device order, the batch sizes and the load mode. Position 0 is the CPU; positions 1, 2, … are
the GPUs in the engine's order. Layers (the output counts as the last one) take non-decreasing positions.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

CPU_POSITION = 0


@dataclass(frozen=True, slots=True)
class GroupChoice:
    """Where a layer's movable groups go, given its home; costs and KiB are the whole layer's.

    `kib` holds (position, KiB) pairs; `is_host` says that weights of a GPU-homed layer stay in host memory, and
    `hides_boundary` that the layer's last work is done there.
    """

    groups: tuple[int, ...]
    decode_us: int
    prompt_us: int
    kib: tuple[tuple[int, int], ...]
    is_host: bool = False
    hides_boundary: bool = False


@dataclass(frozen=True, slots=True)
class LayerTable:
    """Choices per home position; the first of each is "all at home"; an empty tuple forbids that home.

    Layers of one `kind` have equal tables. Layers of one `moves` have equal differences between their choices and
    the first: which of them moves something is all the same, as long as its home is.
    """

    kind: int
    moves: int
    choices: tuple[tuple[GroupChoice, ...], ...]


@dataclass(frozen=True, slots=True)
class Extra:
    """Memory that is needed once any layer takes one of these choices, given as (moves, home, choice index)."""

    choices: frozenset[tuple[int, int, int]]
    kib: tuple[int, ...]  # per position


@dataclass(frozen=True, slots=True)
class Frame:
    """A placement question: minimise Σ cost of the layers' choices under every position's cap.

    `hidden_us` is (decode, prompt) time saved when a layer that ends on the host is the last of its device: its
    return split and the boundary's are one. `fixed_us` is (decode, prompt) time of every answer.
    With pipeline parallelism (`longest_permille` > 0, `hidden_us` zero) the choices' `prompt_us` are what cannot
    overlap, and `longest_permille` of the longest device's sum is added to the prompt.
    """

    positions: tuple[str, ...]
    layers: tuple[LayerTable, ...]
    cap_kib: tuple[int, ...]
    hidden_us: tuple[int, int] = (0, 0)
    fixed_us: tuple[int, int] = (0, 0)
    longest_permille: int = 0
    extras: tuple[Extra, ...] = ()
    max_host_layers: int | None = None
    max_decode_us: int | None = None
    max_prompt_us: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One point of a frame: `homes[i]` a position, `picks[i]` an index into that home's choices."""

    homes: tuple[int, ...]
    picks: tuple[int, ...]


def used_kib(frame: Frame, answer: Answer) -> list[int]:
    """KiB taken at each position."""
    used = [0] * len(frame.positions)
    for table, home, pick in zip(frame.layers, answer.homes, answer.picks, strict=True):
        for position, kib in table.choices[home][pick].kib:
            used[position] += kib
    for extra in taken_extras(frame, answer):
        used = [a + b for a, b in zip(used, extra.kib, strict=True)]
    return used


def taken_extras(frame: Frame, answer: Answer) -> list[Extra]:
    """The extras of which any layer of the answer takes a choice."""
    if not frame.extras:
        return []
    moves = (table.moves for table in frame.layers)
    taken = set(zip(moves, answer.homes, answer.picks, strict=True))
    return [extra for extra in frame.extras if not taken.isdisjoint(extra.choices)]


def times_us(frame: Frame, answer: Answer) -> tuple[int, int]:
    """(decode, prompt) microseconds of an answer: the objective recomputed without the solver."""
    decode, prompt = frame.fixed_us
    stages = [0] * len(frame.positions)
    for i, (table, home, pick) in enumerate(zip(frame.layers, answer.homes, answer.picks, strict=True)):
        choice = table.choices[home][pick]
        decode += choice.decode_us
        stages[home] += choice.prompt_us
        ends_device = i + 1 < len(answer.homes) and 1 <= home < answer.homes[i + 1]
        if choice.hides_boundary and ends_device:
            decode -= frame.hidden_us[0]
            prompt -= frame.hidden_us[1]
    prompt += sum(stages) + frame.longest_permille * max(stages) // 1000
    return decode, prompt


def is_valid(frame: Frame, answer: Answer) -> bool:
    """Whether positions never decrease, every GPU has a layer, homes are allowed and every cap holds."""
    homes = answer.homes
    if any(a > b for a, b in itertools.pairwise(homes)):
        return False
    if not set(range(1, len(frame.positions))) <= set(homes):
        return False
    if any(pick >= len(frame.layers[i].choices[homes[i]]) for i, pick in enumerate(answer.picks)):
        return False
    if frame.max_host_layers is not None and n_host_layers(frame, answer) > frame.max_host_layers:
        return False
    if any(
        most is not None and us > most
        for us, most in zip(times_us(frame, answer), (frame.max_decode_us, frame.max_prompt_us), strict=True)
    ):
        return False
    return all(used <= cap for used, cap in zip(used_kib(frame, answer), frame.cap_kib, strict=True))


def n_host_layers(frame: Frame, answer: Answer) -> int:
    """Layers that live in host memory or keep anything there."""
    taken = zip(frame.layers, answer.homes, answer.picks, strict=True)
    return sum(home == CPU_POSITION or table.choices[home][pick].is_host for table, home, pick in taken)


def is_alike(frame: Frame, one: Answer, other: Answer) -> bool:
    """Whether two answers have the same ranges of layers and place the groups of fewer than two layers differently.

    Layers that move alike may stand for each other: which of them moves something is no difference.
    """
    if one.homes != other.homes:
        return False
    counts = [
        Counter(
            (table.moves, home, table.choices[home][pick].groups)
            for table, home, pick in zip(frame.layers, answer.homes, answer.picks, strict=True)
        )
        for answer in (one, other)
    ]
    return (counts[0] - counts[1]).total() < 2
