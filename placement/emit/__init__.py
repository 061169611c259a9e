"""Assignments to engine arguments and back: `parse(emit_arguments(a))` resolves to `a`."""

from placement.emit.arguments import emit_arguments, shell_command
from placement.emit.devices import EngineDevice, engine_devices
from placement.emit.regex import compile_pattern, layer_ranges, patterns_for
from placement.emit.resolve import layer_homes, resolve, tensor_home

__all__ = [
    "EngineDevice",
    "compile_pattern",
    "emit_arguments",
    "engine_devices",
    "layer_homes",
    "layer_ranges",
    "patterns_for",
    "resolve",
    "shell_command",
    "tensor_home",
]
