"""Profiles → lines of text: one table of all of them, then notes and advice by profile."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from placement.configs.models_conf.choice import Memory
from placement.configs.models_conf.review import ProfileReview, gain
from placement.inputs.problem import HOST
from placement.predict.solution import label_words


def review_lines(profiles: Sequence[ProfileReview], width: int = 100) -> list[str]:
    """The table (memory in MiB with everything on the card included) and what to know about each profile."""
    devices = list(dict.fromkeys(name for each in profiles for name in _names(each) if name != HOST))
    head = ["profile", "", *devices, "host", "splits", "decode", "prompt", "turn", "gain"]
    units = ["", "", *["MiB"] * len(devices), "MiB", "tok/batch", "t/s", "t/s", "s", ""]
    rows = [row for profile in profiles for row in _rows(profile, devices)]
    lines = _aligned([head, units, *rows]) if rows else []
    if labels := {label for each in profiles for label in _labels(each)}:
        told = " or ".join(sorted(labels))
        lines.append(f"Memory (the runtime included) and splits {told}, speeds estimated; ! = over the cap.")
    for note in dict.fromkeys(note for each in profiles for note in _notes(each)):
        lines += textwrap.wrap(f"coarse: {note}", width, subsequent_indent="  ")
    for profile in profiles:
        lines += ["", *_details(profile, width)]
    return lines


def _labels(profile: ProfileReview) -> Iterator[str]:
    """How the figures of both of a profile's rows are known."""
    if profile.now is not None:
        yield label_words(profile.now.label, is_exact=profile.now.is_exact)
    if profile.best is not None:
        yield profile.best.label


def _notes(profile: ProfileReview) -> list[str]:
    """Why they are not exact."""
    now = profile.now.notes if profile.now is not None else ()
    return [*now, *(profile.solution or {}).get("notes", ())]


def _names(profile: ProfileReview) -> list[str]:
    return [*(profile.now.devices if profile.now else ()), *(profile.best.memory if profile.best else ())]


def _rows(profile: ProfileReview, devices: Sequence[str]) -> list[list[str]]:
    now, best = profile.now, profile.best
    if now is None:
        return [[profile.section.name, "cannot be read"]]
    memory = {name: Memory(use.used_mib, use.cap_mib) for name, use in now.devices.items()}
    splits = f"{now.splits_decode}/{now.splits_prompt}"
    speed = _speed(now.speed.decode_tps, now.speed.prompt_tps, now.speed.turn_s)
    rows = [[profile.section.name, "now", *_memory(memory, devices), splits, *speed, ""]]
    if best is not None:
        splits = f"{best.splits_decode}/{best.splits_prompt}"
        speed = _speed(best.decode_tps, best.prompt_tps, best.turn_s)
        rows.append(["", "place", *_memory(best.memory, devices), splits, *speed, _gain(profile)])
    elif profile.message:
        rows.append(["", "place", "nothing fits"])
    return rows


def _memory(uses: dict[str, Memory], devices: Sequence[str]) -> list[str]:
    return [_cell(uses[name]) if name in uses else "-" for name in [*devices, HOST]]


def _cell(use: Memory) -> str:
    return f"{use.used_mib:,.0f}{'!' if use.used_mib > use.cap_mib else ''}"


def _speed(decode_tps: float | None, prompt_tps: float | None, turn_s: float | None) -> list[str]:
    rounded = ((decode_tps, ".1f"), (prompt_tps, ",.0f"), (turn_s, ".1f"))
    return ["-" if value is None else f"{value:{form}}" for value, form in rounded]


def _gain(profile: ProfileReview) -> str:
    if profile.best is not None and profile.applied == profile.best.name:
        return "as it is"
    if profile.now is not None and not profile.now.fits:
        return "it fits"
    percent = gain(profile)
    parts = [("decode", percent["decode_percent"]), ("prompt", percent["prompt_percent"])]
    return ", ".join(f"{name} {round(value):+d} %" for name, value in parts if value is not None)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded to their widest cell; numbers to the right, the first two and the last to the left."""
    n_columns = max(map(len, rows))
    whole = [row for row in rows if len(row) == n_columns]
    widths = [max(len(row[i]) for row in whole) for i in range(n_columns)]
    widths[0] = max(len(row[0]) for row in rows)
    lines = []
    for row in rows:
        cells = [
            cell.ljust(widths[i])
            if i < 2 or i == n_columns - 1 or len(row) < n_columns
            else cell.rjust(widths[i])
            for i, cell in enumerate(row)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _details(profile: ProfileReview, width: int) -> list[str]:
    lines = [f"[{profile.section.name}] line {profile.section.line}"]
    if profile.problem is not None:
        lines += _item("cannot be read", profile.problem, width)
    for note in profile.notes:
        lines += _item("note", note, width)
    if profile.now is not None:
        over = {name: use for name, use in profile.now.devices.items() if use.headroom_mib < 0}
        for name, use in over.items():
            lines += _item("now", f"does not fit {name} by {-use.headroom_mib:,.0f} MiB", width)
        for advice in profile.now.advice:
            lines += _item(advice.code, advice.message, width)
    if profile.applied is not None:
        lines += _item("place", f"this profile is its solution {profile.applied}", width)
    elif profile.best is not None:
        lines += [f"  place: {profile.best.name}", f"    {' '.join(profile.best.args)}"]
    elif profile.message:
        lines += _item("place", profile.message, width)
    return lines


def _item(head: str, text: str, width: int) -> list[str]:
    wrapper = textwrap.TextWrapper(
        width, initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return wrapper.wrap(f"{head}: {text}")
