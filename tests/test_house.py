"""The house as the table of docs/modules.md draws it: who imports whom, and who may touch the outside."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "placement"
OWNERS = {"click": "cli", "httpx": "engine", "ortools": "solver", "subprocess": "engine"}
_ROW = re.compile(r"\| `(\w+)` \| [^|]+ \| ([^|]*) \|")


@cache
def table() -> dict[str, list[str]]:
    """The module table: what each module may import, in the table's order."""
    text = (ROOT / "docs" / "modules.md").read_text(encoding="utf-8")
    return {name: re.findall(r"\w+", allowed) for name, allowed in _ROW.findall(text)}


@cache
def files() -> dict[Path, ast.Module]:
    """Every source file of the package, parsed."""
    return {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in PACKAGE.rglob("*.py")}


def module_of(path: Path) -> str:
    """The name of the module or package of the house that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all imports, those inside functions and for types too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, each.name) for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((node.lineno, f"{node.module}.{each.name}") for each in node.names)


def calls(tree: ast.Module) -> Iterator[tuple[int, ast.Call]]:
    """(line, call) of every call."""
    return ((node.lineno, node) for node in ast.walk(tree) if isinstance(node, ast.Call))


def modules() -> list[str]:
    """Every module and package of the house, beside the package's own file."""
    return sorted({module_of(path) for path in files()} - {"__init__"})


def test_the_table_lists_every_module_once() -> None:
    """The table and the package hold the same modules."""
    assert modules() == sorted(table())


@pytest.mark.parametrize("name", list(table()))
def test_a_module_may_import_only_what_stands_above_it(name: str) -> None:
    """What a row allows stands in the rows above, so there is no cycle."""
    names = list(table())
    above = names[: names.index(name)] if name != "cli" else names
    assert [each for each in table()[name] if each not in above and each != "all"] == []


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_what_the_table_allows(name: str) -> None:
    """No import between modules that the table does not have."""
    found = []
    for path, tree in files().items():
        for line, dotted in imported(tree) if module_of(path) == name else ():
            package, _, rest = dotted.partition(".")
            target = rest.partition(".")[0]
            is_inside = package == "placement" and target in modules() and target != name
            if is_inside and target not in table()[name] and "all" not in table()[name]:
                found.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert found == []


@pytest.mark.parametrize(("library", "owner"), OWNERS.items())
def test_a_library_has_one_importer(library: str, owner: str) -> None:
    """Only its owner imports a library that is a seam to something foreign."""
    users = {
        module_of(path)
        for path, tree in files().items()
        for _, dotted in imported(tree)
        if dotted.partition(".")[0] == library
    }
    assert users == {owner}


def test_a_library_imported_is_a_dependency() -> None:
    """What the package imports is what its installation brings, and no more."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {re.split("[<>=]", each)[0] for each in project["dependencies"]}
    tops = {dotted.partition(".")[0] for tree in files().values() for _, dotted in imported(tree)}
    libraries = tops - sys.stdlib_module_names - {"placement"}
    known = packages_distributions()
    assert wanted == {known[name][0].lower().replace("_", "-") for name in libraries}


def test_only_the_command_line_prints_or_exits() -> None:
    """No print, exit or SystemExit outside cli."""
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path, tree in files().items()
        for line, call in calls(tree)
        if module_of(path) != "cli"
        and ast.unparse(call.func) in ("print", "exit", "sys.exit", "SystemExit", "os._exit")
    ]
    assert found == []


def test_nothing_goes_through_a_shell() -> None:
    """Programs get their arguments as a list: no shell=True and no os.system."""
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path, tree in files().items()
        for line, call in calls(tree)
        if ast.unparse(call.func) in ("os.system", "os.popen")
        or any(word.arg == "shell" for word in call.keywords)
    ]
    assert found == []
