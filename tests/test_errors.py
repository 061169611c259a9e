from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement import errors
from placement.errors import EngineError, InputError, PlacementError


def test_input_error_names_all() -> None:
    """The line has file, field, value and rule in this order."""
    error = InputError("m.toml", "must be positive", field="devices[0].total_mib", value=-1)
    assert str(error) == "m.toml: devices[0].total_mib = -1: must be positive"


def test_input_error_without_field() -> None:
    """Without a field the value stands alone, quoted."""
    assert str(InputError("--kv", "unknown", value="q9")) == "--kv: 'q9': unknown"


@given(st.text(), st.text(), st.text(), st.text())
def test_one_line(where: str, rule: str, field: str, value: str) -> None:
    """Whatever the user typed, the error is one line."""
    assert len(str(InputError(where, rule, field=field, value=value)).splitlines()) <= 1


@pytest.mark.parametrize(("kind", "code"), [(PlacementError, 1), (InputError, 2), (EngineError, 3)])
def test_exit_codes(kind: type[PlacementError], code: int) -> None:
    """1 is infeasible or a mismatch, 2 bad input, 3 the engine."""
    assert code == kind.exit_code


def test_tree_is_complete() -> None:
    """The module's docstring draws every exception that it has."""
    kinds = [name for name, kind in vars(errors).items() if inspect.isclass(kind)]
    assert [name for name in kinds if name not in (errors.__doc__ or "")] == []


def test_engine_errors_exit_with_3() -> None:
    """Every engine error has the engine's exit code."""
    assert {3} == {kind.exit_code for kind in EngineError.__subclasses__()}
