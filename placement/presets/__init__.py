"""The same choice for whatever starts the server: a module per consumer, which quotes by that one's rules.

A format that cannot say an argument, or a program that lacks its meaning, refuses it by name.
"""

from placement.presets.as_json import as_json
from placement.presets.command_line import command_line
from placement.presets.compose import compose
from placement.presets.ik_llama import ik_llama
from placement.presets.koboldcpp import koboldcpp
from placement.presets.launch import Launch
from placement.presets.launches import launch_of_choice, launches_of_conf, with_files
from placement.presets.llama_swap import llama_swap
from placement.presets.router import router_ini
from placement.presets.systemd import systemd

__all__ = [
    "Launch",
    "as_json",
    "command_line",
    "compose",
    "ik_llama",
    "koboldcpp",
    "launch_of_choice",
    "launches_of_conf",
    "llama_swap",
    "router_ini",
    "systemd",
    "with_files",
]
