"""Launches → the text of the format that a user names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from placement.configs.formats.as_json import as_json
from placement.configs.formats.command_line import command_line
from placement.configs.formats.compose import compose
from placement.configs.formats.ik_llama import ik_llama
from placement.configs.formats.koboldcpp import koboldcpp
from placement.configs.formats.launch import Launch
from placement.configs.formats.llama_swap import llama_swap
from placement.configs.formats.router import router_ini
from placement.configs.formats.systemd import systemd
from placement.errors import InputError

MANY: dict[str, Callable[[Sequence[Launch]], str]] = {
    "command": lambda launches: "\n".join(map(command_line, launches)),
    "preset": router_ini,
    "llama-swap": llama_swap,
    "json": as_json,
}
ONE: dict[str, Callable[[Launch], str]] = {
    "compose": compose,
    "systemd": systemd,
    "ik_llama": ik_llama,
    "koboldcpp": koboldcpp,
}
WRITTEN_FORMATS = (*MANY, *ONE)


def written(name: str, launches: Sequence[Launch]) -> str:
    """The launches in the format of that name.

    Raises:
        InputError: no launch, more than one for a format of one, or something that the format cannot say.
    """
    if not launches:
        raise InputError("MODEL", "name at least one model")
    if name in MANY:
        return MANY[name](launches)
    if len(launches) > 1:
        raise InputError("MODEL", f"{name} takes one model", value=" ".join(each.name for each in launches))
    return ONE[name](launches[0])
