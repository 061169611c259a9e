"""Exact placement of large language models on unequal GPUs and CPU for llama.cpp.

    import placement as pl

    model, machine = pl.load_model("glm-flash"), pl.load_machine("rtx4090-rtx5070ti")
    print(pl.solve(model, machine, ctx_tokens=65_536).best.command)

Names are imported when they are used: importing the package alone loads no solver.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from placement.api import Placement, Result, check, detect_machine, load_machine, load_model, solve
    from placement.errors import EngineError, InputError, PlacementError
    from placement.files import PLACE_VERSION as __version__  # noqa: F401 - for type checkers; had by __getattr__
    from placement.solve.request import FixedSettings, Request

__all__ = [
    "EngineError",
    "FixedSettings",
    "InputError",
    "Placement",
    "PlacementError",
    "Request",
    "Result",
    "check",
    "detect_machine",
    "load_machine",
    "load_model",
    "solve",
]
_ERRORS = ("EngineError", "InputError", "PlacementError")
_REQUEST = ("FixedSettings", "Request")


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.import_module(f"{__name__}.files").PLACE_VERSION
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "errors" if name in _ERRORS else "solve.request" if name in _REQUEST else "api"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Package(ModuleType):
    """This package: `solve` stays the function when the wing of that name is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (isinstance(value, ModuleType) and name in __all__):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
