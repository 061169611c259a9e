"""What a solve is asked for: the turn, the limits, what the user fixes. Nothing else comes in, and here defaults stand.

A `Request` that exists keeps every rule that can be told without a model and a machine; `constraints` says what its
pins and kept arguments mean on those, `solve.make_problem` fills in what it leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from placement.errors import InputError
from placement.inputs.problem import PROGRAMS, Program
from placement.inputs.quants import KV_CACHE_TYPES
from placement.llamacpp.arguments import Arguments, parse
from placement.llamacpp.context_rules import MAX_SLOTS

Objective = Literal["turn", "decode", "prompt"]
LoadMode = Literal["auto", "none", "mmap", "mlock", "mmap+mlock", "dio"]
FlashAttention = Literal["on", "off", "auto"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
AUTO_KV_TYPE = "auto"  # the best type that costs little, which `questions` finds
INT_MAX = 2**31 - 1  # the engine's numbers, and CP-SAT's seed, have 32 bits
MOST_BEST = 50
LEAST_TIME_S = 0.05


@dataclass(frozen=True, slots=True)
class FixedSettings:
    """Engine settings that stay as they are, by the fields of `Settings`; None is free.

    Raises:
        InputError: a value that the engine refuses.
    """

    batch_tokens: int | None = None
    is_kv_offloaded: bool | None = None
    is_swa_full: bool | None = None
    is_op_offloaded: bool | None = None
    is_kv_unified: bool | None = None
    flash_attention: FlashAttention | None = None
    n_threads: int | None = None  # at most 0: as many as the engine finds cores
    kv_type_k: str | None = None
    kv_type_v: str | None = None

    def __post_init__(self) -> None:
        _check_whole("-b", self.batch_tokens, 1)
        _check_whole("--threads", self.n_threads, -INT_MAX - 1)
        _check_word("-fa", self.flash_attention, get_args(FlashAttention))
        _check_word("-ctk", self.kv_type_k, KV_CACHE_TYPES)
        _check_word("-ctv", self.kv_type_v, KV_CACHE_TYPES)

    @classmethod
    def of_arguments(cls, arguments: Arguments) -> FixedSettings:
        """What engine arguments say of these settings."""
        return cls(**{each.name: getattr(arguments, each.name) for each in fields(cls)})

    def given(self) -> Iterator[tuple[str, int | bool | str]]:
        """(field, value) of those that are fixed."""
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None:
                yield each.name, value


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asks of a solve; None leaves it to `keep`, the model's profile or the solver, in that order.

    Raises:
        InputError: a value breaks its rule; the error names the command line's option.
    """

    ctx_tokens: int | None = None  # over all slots
    n_slots: int | None = None
    kv_type: str | None = None  # of K and V alike; "auto" is a question
    ubatch_tokens: int | None = None
    prompt_tokens: int = 2000
    generate_tokens: int = 500
    depth_tokens: int | None = None  # None: a quarter of a slot
    reserve_mib: float = 0.0  # kept free on every GPU
    objective: Objective = "turn"
    n_best: int = 0  # so many of the best placements that differ, beside the Pareto front
    program: Program = "llama-server"
    min_decode_tps: float | None = None
    pins: tuple[str, ...] = ()  # "REGEX=DEVICE"
    n_gpu_layers: int | None = None
    tensor_split: tuple[float, ...] | None = None
    devices: tuple[str, ...] | None = None  # in this order; ("none",) is the CPU alone
    max_cpu_layers: int | None = None
    keep: str = ""  # llama.cpp arguments that stay
    fixed: FixedSettings = field(default_factory=FixedSettings)
    load_modes: tuple[LoadMode, ...] = ("auto", "none")  # those that may be selected
    time_limit_s: float = 10.0  # of each search
    seed: int = 1

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.default is not None and getattr(self, each.name) is None:
                raise InputError("request", "must have a value", field=each.name)
        self._check_turn()
        self._check_search()
        self._check_placement()

    def _check_turn(self) -> None:
        _check_whole("--ctx", self.ctx_tokens, 1)
        _check_whole("--parallel", self.n_slots, 1, MAX_SLOTS)
        _check_kv_type(self.kv_type)
        _check_whole("--ubatch", self.ubatch_tokens, 1)
        _check_whole("--prompt", self.prompt_tokens, 1)
        _check_whole("--generate", self.generate_tokens, 1)
        _check_whole("--depth", self.depth_tokens, 0)

    def _check_search(self) -> None:
        _check_number("--reserve", self.reserve_mib, 0)
        _check_word("--objective", self.objective, OBJECTIVES)
        _check_whole("--top", self.n_best, 0, MOST_BEST)
        _check_word("--program", self.program, PROGRAMS)
        _check_number("--min-decode", self.min_decode_tps, 0, is_open=True)
        _check_number("--time-limit", self.time_limit_s, LEAST_TIME_S)
        _check_whole("--seed", self.seed, 0)

    def _check_placement(self) -> None:
        _check_texts("--pin", self.pins)
        _check_whole("--ngl", self.n_gpu_layers, 0)
        _check_whole("--max-cpu-layers", self.max_cpu_layers, 0)
        _check_all("--ts", self.tensor_split)
        for share in self.tensor_split or ():
            _check_number("--ts", share, 0)
        if self.tensor_split is not None and not sum(self.tensor_split):
            raise InputError(
                "--ts", "must give some card a layer", value=",".join(map(str, self.tensor_split))
            )
        _check_all("--devices", self.devices)
        _check_texts("--devices", self.devices or ())
        _check_whole("--threads", self.fixed.n_threads, 1)
        _check_all("--load-mode", self.load_modes)
        for mode in self.load_modes:
            _check_word("--load-mode", mode, get_args(LoadMode))
        if not isinstance(self.keep, str):
            raise InputError("--keep", "must be one text", value=self.keep)
        FixedSettings.of_arguments(self.kept)

    @property
    def kept(self) -> Arguments:
        """The arguments that stay, as the engine reads them."""
        return parse(self.keep)

    def fixed_settings(self) -> Iterator[tuple[str, int | bool | str]]:
        """(field of `Settings`, value) of what is fixed; what `keep` says comes later and wins."""
        yield from self.fixed.given()
        yield from FixedSettings.of_arguments(self.kept).given()


def _check_whole(option: str, value: object, least: int, most: int = INT_MAX) -> None:
    """Refuse what is no whole number from `least` to `most`; None is no value."""
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(option, "must be a whole number", value=value)
    if value < least:
        raise InputError(option, f"must be at least {least}", value=value)
    if value > most:
        raise InputError(option, f"must be at most {most}", value=value)


def _check_number(option: str, value: object, least: float, *, is_open: bool = False) -> None:
    """Refuse what is no finite number from `least` on, itself excluded if `is_open`; None is no value."""
    if value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(option, "must be a finite number", value=value)
    if value < least or (is_open and value == least):
        rule = f"must be above {least:g}" if is_open else f"must be at least {least:g}"
        raise InputError(option, rule, value=value)


def _check_word(option: str, value: object, words: tuple[str, ...]) -> None:
    if value is not None and value not in words:
        raise InputError(option, f"must be one of {', '.join(words)}", value=value)


def _check_kv_type(kv_type: object) -> None:
    if kv_type is None or kv_type == AUTO_KV_TYPE:
        return
    if not isinstance(kv_type, str) or kv_type.lower() not in KV_CACHE_TYPES:
        known = ", ".join(sorted(KV_CACHE_TYPES))
        raise InputError("--kv", f"unknown KV cache type; llama.cpp takes {known}", value=kv_type)


def _check_all(option: str, values: object) -> None:
    """Refuse what is no tuple, or an empty one; None is no value."""
    if values is not None and (not isinstance(values, tuple) or not values):
        raise InputError(option, "must be a tuple of at least one value", value=values)


def _check_texts(option: str, values: object) -> None:
    if not isinstance(values, tuple) or not all(isinstance(each, str) for each in values):
        raise InputError(option, "must be a tuple of texts", value=values)
