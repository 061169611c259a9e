"""Turns llama.cpp's placement arguments and `LLAMA_ARG_*` variables into `Arguments`, as its own parser does.

Values are checked by the rules of common/arg.cpp; what each option then does to a model is `emit.resolve`.
Options that do not concern placement are kept in order in `Arguments.other`; those that this engine build no
longer takes are obeyed in their old meaning and named in `Arguments.removed`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from placement.errors import InputError
from placement.inputs.engine_options import (
    AUTO_WORDS,
    FALSE_WORDS,
    FLASH_WORDS,
    OLDER_LOAD_FLAGS,
    OPTION_BY_NAME,
    OPTIONS,
    TRUE_WORDS,
    VARIABLE_PREFIX,
    EngineOption,
    Value,
    is_option,
    option_name,
)

MAX_DEVICES = 16  # llama_max_devices()

_INT = re.compile(r"\s*[+-]?\d+")
_FLOAT = re.compile(r"\s*[+-]?(\d+\.?\d*([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?)")
_INT_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Override:
    """One `pattern=target` pair; `option` is the canonical option that made it ("-ot", "-cmoe", ...)."""

    pattern: str
    target: str
    option: str = "-ot"


@dataclass(frozen=True, slots=True)
class Arguments:
    """What an engine command line says about placement; None where it says nothing.

    `n_gpu_layers` is negative for "auto" and "all". `overrides` stand in the engine's order: those of the
    environment, then those of the command line. `other` holds every further option with its values;
    `removed` pairs an option that this build no longer takes with what replaces it.
    """

    n_gpu_layers: int | None = None
    tensor_split: tuple[float, ...] | None = None
    split_mode: str | None = None
    main_gpu: int | None = None
    devices: tuple[str, ...] | None = None  # () for "none"
    overrides: tuple[Override, ...] = ()
    rpc: tuple[str, ...] = ()
    ctx_tokens: int | None = None
    ctx_per_slot_tokens: int | None = None
    batch_tokens: int | None = None
    ubatch_tokens: int | None = None
    n_slots: int | None = None  # negative: auto
    is_kv_unified: bool | None = None
    is_kv_offloaded: bool | None = None
    kv_type_k: str | None = None
    kv_type_v: str | None = None
    flash_attention: str | None = None
    is_swa_full: bool | None = None
    is_op_offloaded: bool | None = None
    load_mode: str | None = None
    n_threads: int | None = None
    n_threads_batch: int | None = None
    is_fit: bool | None = None
    fit_target_mib: tuple[int, ...] | None = None
    fit_ctx_tokens: int | None = None
    model_path: str | None = None
    program: str | None = None
    other: tuple[tuple[str, ...], ...] = ()
    removed: tuple[tuple[str, str], ...] = ()


Reader = Callable[[str, str], Any]


def _int(option: str, value: str) -> int:
    """A number as std::stoi reads it: the longest numeric prefix, in 32 bits."""
    match = _INT.match(value)
    if match is None:
        raise InputError(option, "must be a whole number", value=value)
    number = int(match.group())
    if not -_INT_MAX - 1 <= number <= _INT_MAX:
        raise InputError(option, "must fit in 32 bits", value=value)
    return number


def _at_least(least: int) -> Reader:
    def read(option: str, value: str) -> int:
        number = _int(option, value)
        if number < least:
            raise InputError(option, f"must be {least} or more", value=value)
        return number

    return read


def _gpu_layers(option: str, value: str) -> int:
    return {"auto": -1, "all": -2}[value] if value in ("auto", "all") else _int(option, value)


def _slots(option: str, value: str) -> int:
    number = _int(option, value)
    if number == 0:
        raise InputError(option, "must not be 0 (-1 = auto)", value=value)
    return number


def _parts(option: str, value: str) -> list[str]:
    parts = re.split(r"[,/]+", value)
    if len(parts) > 1 and not parts[-1]:
        parts.pop()
    if len(parts) >= MAX_DEVICES:
        raise InputError(option, f"must have fewer than {MAX_DEVICES} values", value=value)
    return parts


def _shares(option: str, value: str) -> tuple[float, ...]:
    shares = []
    for part in _parts(option, value):
        match = _FLOAT.match(part)
        if match is None:
            raise InputError(option, "must be proportions such as 3,1", value=value)
        shares.append(float(match.group()))
    if min(shares) < 0:
        raise InputError(option, "must have no negative proportion", value=value)
    return tuple(shares)


def _sizes(option: str, value: str) -> tuple[int, ...]:
    return tuple(_at_least(0)(option, part) for part in _parts(option, value))


def _one_of(allowed: tuple[str, ...]) -> Reader:
    def read(option: str, value: str) -> str:
        if value not in allowed:
            raise InputError(option, f"must be one of {', '.join(allowed)}", value=value)
        return value

    return read


def _switch(option: str, value: str) -> bool:
    if value not in TRUE_WORDS + FALSE_WORDS:
        raise InputError(option, "must be on or off", value=value)
    return value in TRUE_WORDS


def _flash(option: str, value: str) -> str:
    if value in AUTO_WORDS:
        return "auto"
    if value not in TRUE_WORDS + FALSE_WORDS:
        raise InputError(option, "must be on, off or auto", value=value)
    return "on" if value in TRUE_WORDS else "off"


def _devices(option: str, value: str) -> tuple[str, ...]:
    names = tuple(value.split(","))
    if names == ("none",):
        return ()
    if not all(names):
        raise InputError(option, "must be device names such as CUDA0,CUDA1, or none", value=value)
    return names


def _servers(option: str, value: str) -> tuple[str, ...]:
    servers = tuple(value.split(","))
    if not all(":" in server for server in servers):
        raise InputError(option, "must be host:port, comma-separated", value=value)
    return servers


def _text(option: str, value: str) -> str:
    return value


def read_overrides(option: str, value: str) -> tuple[Override, ...]:
    """The pairs of an `-ot` value: split at commas, then at the first "=" (arg.cpp).

    Raises:
        InputError: a part has no "=".
    """
    overrides = []
    for part in value.split(","):
        pattern, equals, target = part.partition("=")
        if not equals:
            raise InputError(option, "must be PATTERN=BUFFER, comma-separated", value=part)
        overrides.append(Override(pattern, target))
    return tuple(overrides)


def _first_layers(of: EngineOption) -> Reader:
    def read(option: str, value: str) -> tuple[Override, ...]:
        n_layers = _at_least(0)(option, value)
        return tuple(Override(rf"blk\.{layer}{of.pattern}", "CPU", of.name) for layer in range(n_layers))

    return read


_READERS: dict[Value, Reader] = {
    "gpu_layers": _gpu_layers,
    "shares": _shares,
    "devices": _devices,
    "servers": _servers,
    "overrides": read_overrides,
    "slots": _slots,
    "switch": _switch,
    "flash": _flash,
    "sizes": _sizes,
    "text": _text,
}


def _reader(option: EngineOption) -> Reader:
    """What reads the option's value by its rules."""
    if option.value == "number":
        return _int if option.least is None else _at_least(option.least)
    if option.value == "word":
        return _one_of(option.allowed)
    if option.value == "first_layers":
        return _first_layers(option)
    return _READERS[option.value]


_READER_BY_NAME = {option.name: _reader(option) for option in OPTIONS if option.has_value}


def _said(option: EngineOption) -> Any:
    """What a flag sets its field to."""
    return (Override(option.pattern, "CPU", option.name),) if option.pattern else True


def parse(tokens: Sequence[str] | str, env: Mapping[str, str] | None = None) -> Arguments:
    """Read engine arguments; a whole string is split nearly as a POSIX shell would split it.

    The command line beats the environment, except that overrides of both count, the environment's first. A
    first token that is no option is the program. A bare `-fa` means on, as in older builds.

    Raises:
        InputError: a value that the engine refuses, a missing value, or `--option=value`, which the engine
            does not know.
    """
    words = _split(tokens) if isinstance(tokens, str) else list(tokens)
    reading = _Reading()
    for option in OPTIONS:
        reading.take_env(option, env or {})
    if words and not words[0].startswith("-"):
        reading.values["program"] = re.split(r"[/\\]", words.pop(0))[-1]
    while words:
        reading.take(words)
    return Arguments(
        **reading.values,
        overrides=tuple(reading.overrides),
        other=tuple(reading.other),
        removed=tuple(reading.removed),
    )


_SHELL_PIECE = re.compile(r"""'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\\'"]+|.""", re.DOTALL)


def _split(text: str) -> list[str]:
    """Words as a POSIX shell makes them, except that a bare backslash before anything but white space, a quote or
    another backslash stays: people paste `blk\\.1\\.` from files where it needs no quotes."""

    def keep(match: re.Match[str]) -> str:
        piece = match.group()
        is_bare_escape = piece[0] == "\\" and len(piece) == 2
        return "\\" + piece if is_bare_escape and piece[1] not in " \t\n'\"\\" else piece

    try:
        return shlex.split(_SHELL_PIECE.sub(keep, text.replace("\\\n", " ")))
    except ValueError as error:
        raise InputError("arguments", f"must have closed quotes ({error})", value=text) from error


class _Reading:
    """The values read so far."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.overrides: list[Override] = []
        self.other: list[tuple[str, ...]] = []
        self.removed: list[tuple[str, str]] = []

    def put(self, option: EngineOption, value: Any) -> None:
        if option.field == "overrides":
            self.overrides.extend(value)
        else:
            self.values[option.field] = value

    def take_env(self, option: EngineOption, env: Mapping[str, str]) -> None:
        """Read the option's variable; a LLAMA_ARG_NO_ one switches off whatever it holds."""
        if option.variable is None:
            return
        name = f"{VARIABLE_PREFIX}{option.variable}"
        if option.off_names and f"{VARIABLE_PREFIX}NO_{option.variable}" in env:
            self.put(option, False)
        elif name not in env:
            return
        elif option.has_value:
            self.put(option, _READER_BY_NAME[option.name](name, env[name]))
        elif option.off_names:
            self.put(option, _switch(name, env[name]))
        elif env[name] in TRUE_WORDS:
            self.put(option, _said(option))

    def take(self, words: list[str]) -> None:
        """Read one option and its value off the start of `words`."""
        word = words.pop(0)
        name = option_name(word)
        option = OPTION_BY_NAME.get(name)
        if name in OLDER_LOAD_FLAGS:
            self.values["load_mode"] = OLDER_LOAD_FLAGS[name]
            self.removed.append((word, f"-lm {OLDER_LOAD_FLAGS[name]}"))
        elif option is None:
            self._take_other(word, name, words)
        elif option.has_value:
            self.put(option, self._value(option, word, words))
        else:
            self.put(option, name in option.names and _said(option))

    def _value(self, option: EngineOption, word: str, words: list[str]) -> Any:
        if option.value == "flash" and (not words or words[0] not in FLASH_WORDS):
            self.removed.append((word, f"{word} on"))
            return "on"
        if not words:
            raise InputError(word, "must be followed by a value")
        return _READER_BY_NAME[option.name](word, words.pop(0))

    def _take_other(self, word: str, name: str, words: list[str]) -> None:
        known = name.partition("=")[0]
        if known != name and known in OPTION_BY_NAME:
            raise InputError(word, f"must be two words: the engine does not take {known}=VALUE")
        group = [word]
        while words and not is_option(words[0]):
            group.append(words.pop(0))
        self.other.append(tuple(group))
