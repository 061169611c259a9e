"""A choice → the same models.conf with one section's placement replaced, and a comment block that says why.

Everything else stays byte for byte. The replaced lines are kept in the block. Applying the same choice again
changes nothing: a block that differs in its date alone is left as it is.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from placement.configs.models_conf.choice import Choice, Measured
from placement.configs.models_conf.measured import placement_of
from placement.configs.models_conf.models_conf import (
    Entry,
    ModelsConf,
    Section,
    conf_of_lines,
    placement_lines,
    split_lines,
    words,
)
from placement.configs.models_conf.options import OptionPart, by_option, merged
from placement.errors import InputError
from placement.files import PLACE_VERSION, write_atomically
from placement.llamacpp.arguments import parse

BLOCK_BEGIN, BLOCK_END = "# >>> place", "# <<< place"
_BEFORE, _DATE, _KEPT = "# before:", "# date: ", "#   "


@dataclass(frozen=True, slots=True)
class Applied:
    """A file before and after; `text` of both is what `write` writes and `diff` compares."""

    before: ModelsConf
    after: ModelsConf

    @property
    def is_changed(self) -> bool:
        """Whether a byte differs."""
        return self.before.lines != self.after.lines

    def diff(self) -> str:
        """A unified diff; empty where nothing changes."""
        name = Path(self.before.where).name
        rows = []
        for line in difflib.unified_diff(self.before.lines, self.after.lines, name, name):
            rows.append(line.removesuffix("\n").removesuffix("\r"))
            if not line.endswith("\n"):
                rows.append("\\ No newline at end of file")
        return "\n".join(rows).encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    def write(self) -> bool:
        """Replace the file in one step, its older version beside it as NAME.bak; False where nothing changes.

        Raises:
            InputError: the file cannot be written, or has changed since it was read.
        """
        path = Path(self.before.where).resolve()  # the file itself, not a link to it
        if not self.is_changed:
            return False
        try:
            is_same, mode = path.read_bytes() == self.before.to_bytes(), path.stat().st_mode & 0o7777
        except OSError as exc:
            raise InputError(path, f"cannot be read: {exc.strerror or exc}") from exc
        if not is_same:
            raise InputError(path, "has changed since it was read: nothing was written")
        write_atomically(path, self.after.to_bytes())
        path.chmod(mode)
        return True


def apply_choice(
    conf: ModelsConf,
    name: str,
    choice: Choice,
    *,
    date: str,
    engine_build: str | None = None,
    measured: Measured | None = None,
) -> Applied:
    """Put a choice into the section of that name.

    Raises:
        InputError: there is no such section, or more than one; or its arguments cannot be read or written.
    """
    section = conf.section(name)
    choice = _with_layers_kept(choice, section)
    picked = by_option(choice.args)
    old_block = _block_lines(conf, section)
    bare = _without_block(conf, section)
    texts, replaced = _rewrite(bare, bare.section(name), picked)
    header, body = _split_header(_with_texts(bare, bare.section(name), texts))
    kept = _kept_lines(old_block, lines_digest(bare, bare.section(name)), replaced)
    written = conf_of_lines([header, *body], conf.where)
    _check_read_back(written.sections[0], choice)
    before = [_BEFORE, *(f"{_KEPT}{line}" for line in kept)] if kept else []
    digest = lines_digest(written, written.sections[0])
    why = [*_reasons(choice, engine_build, measured), f"{_DATE}{date}", *before, f"{BLOCK_END} {digest}"]
    newline = "\r\n" if header.endswith("\r\n") else "\n"
    block: Sequence[str] = [f"{text}{newline}" for text in why]
    if _undated(block) == _undated(old_block):
        block = old_block
    new = [*conf.lines[: section.first], header, *block, *body, *conf.lines[section.end :]]
    return Applied(conf, conf_of_lines(new, conf.where))


def _with_layers_kept(choice: Choice, section: Section) -> Choice:
    """The choice with the section's own `-ngl` where both mean all layers."""
    own = parse(section.tokens()).n_gpu_layers
    meant = parse(choice.args).n_gpu_layers
    if not choice.is_all_on_gpus or own is None or meant is None or own <= meant:
        return choice
    at = choice.args.index("-ngl") + 1
    return dataclasses.replace(choice, args=(*choice.args[:at], str(own), *choice.args[at + 1 :]))


def _rewrite(
    conf: ModelsConf, section: Section, picked: dict[str, OptionPart]
) -> tuple[dict[int, tuple[int, str | None]], list[str]]:
    """Last line and new text (None: gone) of each entry that changes, by first line; and the old texts."""
    counting = section.current().values()
    keyed = {entry.option for entry in counting if entry.option in picked}
    texts: dict[int, tuple[int, str | None]] = {}
    replaced: list[str] = []
    for entry, text in placement_lines(conf, section):
        if entry.option == "-t" and "-t" not in picked:
            continue
        value = _new_value(entry, picked, keyed) if entry in counting else None
        if value is not None and value == entry.value:
            continue
        texts[entry.first] = (entry.last, None if value is None else entry.written(value))
        replaced += [line.rstrip("\r") for line in text.split("\n")]
    if not any(entry.is_extra_args for entry in section.entries):
        texts |= _extra_args_added(conf, section, texts, picked)
    return texts, replaced


def _new_value(entry: Entry, picked: dict[str, OptionPart], keyed: set[str]) -> str | None:
    if entry.is_extra_args:
        old = words(entry.value)
        new = [word.raw for word in merged(old, picked, keyed)]
        value = entry.value if new == [word.raw for word in old] else " ".join(new)
        quote = entry.tail[:1] if entry.tail[:1] in ("'", '"') else None
        if quote and quote in value:
            raise InputError("EXTRA_ARGS", f"must not have a {quote} inside {quote}", value=value)
        return value
    part = picked.get(entry.option or "")
    return part.values[1] if part is not None else None


def _extra_args_added(
    conf: ModelsConf,
    section: Section,
    texts: dict[int, tuple[int, str | None]],
    picked: dict[str, OptionPart],
) -> dict[int, tuple[int, str | None]]:
    """The text of the last entry with an EXTRA_ARGS line after it, for what no key of the section says."""
    keyed = {entry.option for entry in section.entries}
    left = [word.raw for option, part in picked.items() if option not in keyed for word in part.words]
    if not left:
        return {}
    first, last = max(((e.first, e.last) for e in section.entries), default=(section.first, section.first))
    end, text = texts.get(first, (last, "".join(conf.lines[first : last + 1])))
    if text and not text.endswith("\n"):
        text += conf.newline
    return {first: (end, f"{text or ''}EXTRA_ARGS={' '.join(left)}{conf.newline}")}


def _with_texts(conf: ModelsConf, section: Section, texts: dict[int, tuple[int, str | None]]) -> str:
    """The section's text with entries rewritten; it ends with a line end only where it did."""
    out: list[str] = []
    at = section.first
    while at < section.end:
        last, text = texts.get(at, (at, conf.lines[at]))
        out.append(text or "")
        at = last + 1
    text = "".join(out)
    if not conf.lines[section.end - 1].endswith("\n"):
        return text.removesuffix("\n").removesuffix("\r")
    return text


def _split_header(text: str) -> tuple[str, tuple[str, ...]]:
    header, *body = split_lines(text)
    return header if header.endswith("\n") else f"{header}\n", tuple(body)


def _block_lines(conf: ModelsConf, section: Section) -> tuple[str, ...]:
    """The section's comment block; empty without a whole one."""
    begin = None
    for at in range(section.first + 1, section.end):
        if conf.lines[at].startswith(BLOCK_BEGIN):
            begin = at
        elif conf.lines[at].startswith(BLOCK_END) and begin is not None:
            return conf.lines[begin : at + 1]
    return ()


def _without_block(conf: ModelsConf, section: Section) -> ModelsConf:
    block = _block_lines(conf, section)
    if not block:
        return conf
    lines = conf.lines[section.first : section.end]
    begin = next(at for at in range(len(lines)) if lines[at : at + len(block)] == block)
    kept = (*lines[:begin], *lines[begin + len(block) :])
    return conf_of_lines([*conf.lines[: section.first], *kept, *conf.lines[section.end :]], conf.where)


def lines_digest(conf: ModelsConf, section: Section) -> str:
    """Eight hex digits over the section's placement lines: tells whether someone edited them since."""
    text = "\n".join(text for _, text in placement_lines(conf, section))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _kept_lines(old_block: Sequence[str], digest: str, replaced: Sequence[str]) -> list[str]:
    """What to keep as comments: the old block's lines, and those replaced now that `place` did not write."""
    lines = [line.rstrip("\r\n") for line in old_block]
    if not lines:
        return list(replaced)
    start = lines.index(_BEFORE) + 1 if _BEFORE in lines else len(lines)
    kept = [line.removeprefix(_KEPT) for line in lines[start:] if line.startswith(_KEPT)]
    is_ours = lines[-1].endswith(digest)
    return kept + ([] if is_ours else [line for line in replaced if line not in kept])


def _check_read_back(section: Section, choice: Choice) -> None:
    """Insist that the section now says exactly the choice about placement."""
    meant = placement_of(choice.args)
    for field, value in placement_of(section.tokens()).items():
        if value != meant[field]:
            raise InputError(f"[{section.name}]", "would not read back as chosen", field=field)


def _undated(block: Sequence[str]) -> list[str]:
    return [line.rstrip("\r\n") for line in block if not line.startswith(_DATE)]


def _reasons(choice: Choice, engine_build: str | None, measured: Measured | None) -> list[str]:
    """The block's lines: what was selected, why, what is predicted and what was measured."""
    cards = [f"{name} {use.used_mib:,.0f} of {use.cap_mib:,.0f}" for name, use in choice.memory.items()]
    rows = [
        f"{BLOCK_BEGIN}: {choice.name} for {choice.model} on {choice.machine}",
        f"# why: {choice.criteria}",
        f"# memory in MiB, {choice.label}: {', '.join(cards)}",
        f"# splits, {choice.label}: {choice.splits_decode} a token, {choice.splits_prompt} a prompt batch",
        f"# speed, estimated: {_speeds(choice.decode_tps, choice.prompt_tps)}",
    ]
    if measured is not None:
        rows.append(f"# measured: {_measured(measured)}")
    build = (measured.engine_build if measured else None) or engine_build
    rows.append(f"# engine: {f'llama.cpp {build}' if build else 'none asked'}; place {PLACE_VERSION}")
    return [_one_line(row) for row in rows]


def _one_line(text: str) -> str:
    return re.sub(r"[\r\n]+", " ", text)


def _speeds(decode_tps: float | None, prompt_tps: float | None) -> str:
    decode = "decode unknown" if decode_tps is None else f"decode {decode_tps:.1f} t/s"
    return f"{decode}, prompt {'unknown' if prompt_tps is None else f'{prompt_tps:,.0f} t/s'}"


def _measured(run: Measured) -> str:
    parts = [", ".join(f"{name} {used:,.0f} MiB" for name, used in run.memory_mib.items())]
    if run.splits_decode is not None:
        parts.append(f"{run.splits_decode} splits a token")
    parts.append(_speeds(run.decode_tps, run.prompt_tps))
    return "; ".join(filter(None, [*parts, run.date]))
