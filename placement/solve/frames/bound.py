"""A configuration's lower bound from sums over the kinds of layers, before its frame is built.

Each layer takes whatever home and moves suit it best, in any order, when memory on the GPUs has one price in all;
any price gives a bound. It is far quicker and somewhat lower than what the frame's segments give.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from math import inf

import numpy as np
from numpy.typing import NDArray

from placement.solve.frames.tables import TableBuilder
from placement.units import KIB

MOST_PRICES = 6
ROUNDING_US = 4.0  # a choice's two times and its difference's, each rounded by itself

Array = NDArray[np.float64]


def kinds_lower_bound(
    builder: TableBuilder, fixed_us: tuple[int, int], cap_kib: tuple[int, ...], weights: tuple[int, int]
) -> float:
    """The least objective in microseconds that the configuration could have; infinite where some layer has no home."""
    n_of_kind = builder.pieces.n_of_kind
    times, kib = _homes(builder, weights)
    room = sum(cap_kib[1:])
    needed = np.where(np.isinf(times), inf, kib).min(axis=1)
    if np.isinf(needed).any() or (not builder.configuration.uses_host and n_of_kind @ needed > room):
        return inf
    options = [(times, kib), *_host_moves(builder, weights, times, kib)]
    elsewhere = times - _gain_elsewhere(builder, weights), kib
    best = -inf
    for price in _prices(options):
        priced = np.minimum.reduce([each + price * size for each, size in (*options, elsewhere)])
        best = max(best, float(n_of_kind @ priced.min(axis=1)) - price * room)
    hidden = (len(builder.positions) - 2) * _weighted(weights, builder.hidden_us())
    slack = ROUNDING_US * sum(weights) * (len(builder.pieces.kinds) + 1)
    return best + _weighted(weights, fixed_us) - max(hidden, 0) - slack


def _weighted(weights: tuple[int, int], us: tuple[int, int]) -> int:
    return weights[0] * us[0] + weights[1] * us[1]


def _part_us(builder: TableBuilder, weights: tuple[int, int]) -> tuple[Array, Array]:
    """Weighted microseconds of kind × part × position, decode and prompt."""
    n_stages = max(sum(builder.is_allowed(0, p) for p in range(len(builder.positions))), 1)
    overlap = builder.serial_share() * (1.0 + builder.longest_permille() / 1000 / n_stages)
    generated = max(builder.problem.workload.generate_tokens, 1)
    return builder.decode_s * (1e6 * weights[0] * generated), builder.prompt_s * (1e6 * weights[1] * overlap)


def _homes(builder: TableBuilder, weights: tuple[int, int]) -> tuple[Array, Array]:
    """Weighted time and GPU memory in KiB of kind × home, everything at home."""
    decode, prompt = _part_us(builder, weights)
    n_positions = len(builder.positions)
    kv_at = [builder.kv_position(p) for p in range(n_positions)]
    times = decode[:, :-1].sum(axis=1) + decode[:, -1, kv_at] + prompt.sum(axis=1)
    for kind in builder.pieces.example:
        for home in range(n_positions):
            if not builder.is_allowed(kind, home):
                times[kind, home] = inf
    context = builder.loads.context_bytes[:, None] * np.array([at > 0 for at in kv_at])
    kib = (builder.n_bytes.sum(axis=1) * (np.arange(n_positions) > 0) + context) / KIB
    return times, kib


def _host_moves(
    builder: TableBuilder, weights: tuple[int, int], times: Array, kib: Array
) -> Iterator[tuple[Array, Array]]:
    """The same with some groups in host memory."""
    if not builder.configuration.uses_host:
        return
    decode, prompt = _part_us(builder, weights)
    parts = decode + prompt
    more = parts[:, :, :1] - parts
    split_us = _split_us(builder, weights, 0)
    n_groups = builder.pieces.n_parts - 1
    groups = np.arange(1, n_groups + 1)
    is_gpu = np.arange(len(builder.positions)) > 0
    for n in range(1, n_groups + 1):
        for chosen in itertools.combinations(groups, n):
            freed = builder.n_bytes[:, list(chosen)].sum(axis=1) / KIB
            is_real = (freed > 0) & is_gpu
            moved = times + more[:, list(chosen)].sum(axis=1) + split_us
            yield np.where(is_real, moved, inf), np.where(is_real, kib - freed, 0.0)


def _gain_elsewhere(builder: TableBuilder, weights: tuple[int, int]) -> Array:
    """What moving groups to another GPU saves at most, of kind × home."""
    decode, prompt = _part_us(builder, weights)
    parts = (decode + prompt)[:, 1:-1]
    gain = np.zeros((len(parts), parts.shape[2]))
    if not builder.configuration.is_pipelined and parts.shape[2] > 2 and parts.shape[1]:
        best = parts[:, :, 1:].min(axis=2, keepdims=True)
        gain[:, 1:] = (parts - best).sum(axis=1)[:, 1:] - _split_us(builder, weights, 2)
    return gain.clip(min=0.0)


def _split_us(builder: TableBuilder, weights: tuple[int, int], n_between: int) -> float:
    """The least weighted time of the splits that a move adds."""
    decode_s, prompt_s = builder.cost.splits_s(2, 1, n_between)
    generated = max(builder.problem.workload.generate_tokens, 1)
    return 1e6 * (weights[0] * generated * decode_s + weights[1] * builder.serial_share() * prompt_s)


def _prices(options: list[tuple[Array, Array]]) -> list[float]:
    """Nothing, and what a KiB costs that is freed by each option where the layer is cheapest."""
    times, kib = options[0]
    rows = np.arange(len(times))
    home = np.argmin(times[:, 1:], axis=1) + 1 if times.shape[1] > 1 else np.argmin(times, axis=1)
    found = [0.0]
    for other, left in [(times[:, :1], kib[:, :1]), *options[1:]]:
        at = home if other.shape[1] > 1 else np.zeros_like(home)
        freed = kib[rows, home] - left[rows, at]
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = (other[rows, at] - times[rows, home]) / freed
        found += ratio[(freed > 0) & np.isfinite(ratio) & (ratio > 0)].tolist()
    prices = np.unique(np.round(found, 9))
    if len(prices) > MOST_PRICES:
        prices = prices[np.linspace(0, len(prices) - 1, MOST_PRICES).round().astype(int)]
    return [float(price) for price in prices]
