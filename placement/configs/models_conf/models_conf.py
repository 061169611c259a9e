"""A models.conf into sections and entries that remember their place in the file, and back, byte for byte.

Writing what was read gives the same bytes: comments, blank lines, mixed line ends, a byte-order mark, bytes
that are no UTF-8, a missing final newline. A line that cannot be read is a problem of its section, never an
error. Backslashes are literal everywhere (`blk\\.` is a regular expression); quotes only group where they
enclose a whole word, or the whole value.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from placement.errors import InputError
from placement.inputs.engine_options import OPTIONS, VARIABLE_PREFIX

MAX_BYTES = 1 << 24
_HEADER = re.compile(r"\s*\[(?P<name>[^\]]*)\]\s*(?:[#;].*)?")
_ENTRY = re.compile(
    r"(?P<head>\s*(?:export\s+)?(?P<key>[A-Za-z_][A-Za-z0-9_.-]*)\s*=\s*)(?P<rest>.*)", re.DOTALL
)
_WORD = re.compile(r"'[^']*'(?=\s|$)|\"[^\"]*\"(?=\s|$)|\S+")
_CONTINUED = re.compile(r"(?:^|\s)\\$")
_EXTRA_ARGS = ("EXTRA_ARGS", "ARGS")

# Keys are the engine's own variables of options with a value; with LLAMA_ARG_ before them they are read too.
KEY_OPTIONS = {option.variable: option.name for option in OPTIONS if option.variable and option.has_value}


@dataclass(frozen=True, slots=True)
class Word:
    """One argument: as it stands in the file, and as the engine gets it."""

    raw: str
    value: str


@dataclass(frozen=True, slots=True)
class Entry:
    """`KEY=value` on lines `first` to `last` (from 0); `head`, value, `tail`, `ending` make up the text."""

    key: str
    value: str
    first: int
    last: int
    head: str
    tail: str
    ending: str

    @property
    def option(self) -> str | None:
        """The engine option that the key stands for; None for others and for EXTRA_ARGS."""
        return KEY_OPTIONS.get(self.key.upper().removeprefix(VARIABLE_PREFIX))

    @property
    def is_extra_args(self) -> bool:
        """Whether the value is a list of engine arguments."""
        return self.key.upper() in _EXTRA_ARGS

    def written(self, value: str) -> str:
        """The text of the entry with another value."""
        return f"{self.head}{value}{self.tail}{self.ending}"


@dataclass(frozen=True, slots=True)
class Section:
    """A `[name]` with its entries; lines `first` (the header) up to, not including, `end`."""

    name: str
    first: int
    end: int
    entries: tuple[Entry, ...]
    problems: tuple[str, ...]

    @property
    def line(self) -> int:
        """The header's line number, from 1."""
        return self.first + 1

    def current(self) -> dict[str, Entry]:
        """The entry that counts for each key: the last one."""
        return {entry.key.upper().removeprefix(VARIABLE_PREFIX): entry for entry in self.entries}

    def tokens(self) -> list[str]:
        """The engine arguments of the section: its keys' first, then EXTRA_ARGS, so that the latter win.

        Raises:
            InputError: a quote is not closed.
        """
        entries = self.current().values()
        keyed = [(entry.option, entry.value) for entry in entries if entry.option and entry.value]
        extra = [word.value for entry in entries if entry.is_extra_args for word in words(entry.value)]
        return [token for option, value in keyed for token in (option, value) if option] + extra


@dataclass(frozen=True)
class ModelsConf:
    """A file's lines with their ends, and its sections; `problems` are of lines before the first one."""

    where: str
    lines: tuple[str, ...]
    sections: tuple[Section, ...]
    problems: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """The file, exactly."""
        return "".join(self.lines).encode("utf-8", "surrogateescape")

    def section(self, name: str) -> Section:
        """The section of that name.

        Raises:
            InputError: there is none, or more than one.
        """
        results = [section for section in self.sections if section.name == name]
        if len(results) == 1:
            return results[0]
        if not results:
            known = ", ".join(section.name for section in self.sections) or "none"
            raise InputError(self.where, f"has no section of that name; its sections: {known}", value=name)
        lines = ", ".join(str(section.line) for section in results)
        raise InputError(self.where, f"has this section more than once (lines {lines})", value=name)

    @property
    def newline(self) -> str:
        """The line end that most lines have."""
        n_crlf = sum(line.endswith("\r\n") for line in self.lines)
        return "\r\n" if n_crlf * 2 > len(self.lines) else "\n"


def read_models_conf(path: str | Path) -> ModelsConf:
    """Read a models.conf.

    Raises:
        InputError: the file cannot be read, or is no text.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as exc:
        raise InputError(path, f"cannot be read: {exc.strerror or exc}") from exc
    if len(data) > MAX_BYTES:
        raise InputError(path, f"must have at most {MAX_BYTES} bytes")
    return parse_models_conf(data, str(path))


def parse_models_conf(data: bytes, where: str = "models.conf") -> ModelsConf:
    """The sections of a models.conf's bytes.

    Raises:
        InputError: the bytes are no text (a NUL byte: UTF-16, or no text file at all).
    """
    if b"\0" in data:
        raise InputError(where, "must be UTF-8 text")
    return conf_of_lines(split_lines(data.decode("utf-8", "surrogateescape")), where)


def split_lines(text: str) -> tuple[str, ...]:
    """Lines with their ends; only a line feed ends one."""
    lines = text.split("\n")
    return tuple([f"{line}\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else []))


def conf_of_lines(lines: Sequence[str], where: str) -> ModelsConf:
    """The sections of lines."""
    starts = [i for i, line in enumerate(lines) if _body(line, i).lstrip().startswith("[")]
    sections = []
    for first, end in itertools.pairwise([*starts, len(lines)]):
        name, problems = _name(_body(lines[first], first), first)
        entries, unread = _entries(lines, first + 1, end)
        sections.append(Section(name, first, end, entries, (*problems, *unread)))
    head = starts[0] if starts else len(lines)
    entries, problems = _entries(lines, 0, head)
    outside = tuple(f"line {entry.first + 1}: {entry.key} stands before any section" for entry in entries)
    return ModelsConf(where, tuple(lines), tuple(sections), (*outside, *problems))


def words(value: str) -> list[Word]:
    """The arguments in a value, split at white space; quotes around a whole word go, backslashes stay.

    Raises:
        InputError: a word begins with a quote that no word ends with.
    """
    results = []
    for match in _WORD.finditer(value):
        raw = match.group()
        if raw[0] in "'\"":
            if len(raw) < 2 or raw[-1] != raw[0]:
                raise InputError("EXTRA_ARGS", "must have closed quotes", value=raw)
            results.append(Word(raw, raw[1:-1]))
        else:
            results.append(Word(raw, raw))
    return results


def quoted(value: str) -> str:
    """A word that `words` reads back as this value.

    Raises:
        InputError: no quoting can say it.
    """
    if value and not re.search(r"\s", value) and value[0] not in "'\"#":
        return value
    for quote in "'\"":
        if quote not in value and not re.search(r"[\r\n]", value):
            return f"{quote}{value}{quote}"
    raise InputError("EXTRA_ARGS", "must not mix both kinds of quotes, or break a line", value=value)


def _body(line: str, index: int) -> str:
    """The line without its end, and without a byte-order mark."""
    body = line.removesuffix("\n").removesuffix("\r")
    return body.removeprefix("\ufeff") if index == 0 else body


def _name(body: str, index: int) -> tuple[str, tuple[str, ...]]:
    match = _HEADER.fullmatch(body)
    if match is None:
        return body.strip().strip("[]").strip(), (f"line {index + 1}: must be [name]",)
    name = match["name"].strip()
    return name, (() if name else (f"line {index + 1}: the section has no name",))


def _entries(lines: Sequence[str], first: int, end: int) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    entries: list[Entry] = []
    problems: list[str] = []
    at = first
    while at < end:
        body = _body(lines[at], at)
        last = at
        match = _ENTRY.fullmatch(body)
        if match:
            entry = _entry(match, lines, at, end)
            if any(entry.key.upper() == other.key.upper() for other in entries):
                problems.append(f"line {at + 1}: {entry.key} is given again; the last one counts")
            entries.append(entry)
            last = entry.last
        elif body.strip() and body.lstrip()[0] not in "#;":
            problems.append(f"line {at + 1}: must be KEY=VALUE, [section] or a comment")
        at = last + 1
    return tuple(entries), tuple(problems)


def _entry(match: re.Match[str], lines: Sequence[str], first: int, end: int) -> Entry:
    parts, last = [match["rest"].rstrip()], first
    while _CONTINUED.search(parts[-1]) and last + 1 < end:
        last += 1
        parts[-1] = parts[-1][:-1].rstrip()
        parts.append(_body(lines[last], last).strip())
    start = _bom(lines[first], first) + match["head"]
    ending = lines[last][len(lines[last].removesuffix("\n").removesuffix("\r")) :]
    text = " ".join(filter(None, parts)) if last > first else match["rest"]
    opening, value, tail = _value(text)
    return Entry(match["key"], value, first, last, start + opening, tail, ending)


def _bom(line: str, index: int) -> str:
    return "\ufeff" if index == 0 and line.startswith("\ufeff") else ""


def _value(text: str) -> tuple[str, str, str]:
    """What opens a value, the value, and what follows it: a closing quote, white space, a comment."""
    end = next((m.start() for m in _WORD.finditer(text) if m.group().startswith("#")), len(text))
    value = text[:end].rstrip()
    tail = text[len(value) :]
    for quote in "'\"":
        if len(value) >= 2 and value[0] == value[-1] == quote and quote not in value[1:-1]:
            return quote, value[1:-1], quote + tail
    return "", value, tail


def placement_lines(conf: ModelsConf, section: Section) -> Iterator[tuple[Entry, str]]:
    """Each entry of a section that says something about placement, with its text without the line end."""
    for entry in section.entries:
        if (entry.option and entry.option != "-m") or entry.is_extra_args:
            text = "".join(conf.lines[entry.first : entry.last + 1])
            yield entry, text.removesuffix("\n").removesuffix("\r").removeprefix("\ufeff")
