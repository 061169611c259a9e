"""The house as docs/architecture.md draws it: which wing imports which, who may touch the outside, and its words."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "placement"
BESIDE = {
    "errors",
    "units",
    "files",
    "api",
}  # what stands at the top beside the wings, and may be used by all
TOP = BESIDE | {"__init__", "__main__"}
MOST_AT_THE_TOP = 12
LONGEST_CHAIN = 24
OWNERS = {"click": "cli", "httpx": "engine", "ortools": "solve", "subprocess": "engine"}
_ROW = re.compile(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \| ([^|]*) \|$", re.MULTILINE)


@cache
def wings() -> dict[str, list[str]]:
    """The table of docs/architecture.md: what each wing may import, in the table's order."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows: dict[str, list[str]] = {}
    for name, allowed in _ROW.findall(text):
        rows[name] = list(rows) if allowed == "all" else re.findall(r"\w+", allowed)
    return rows


@cache
def files() -> dict[str, Path]:
    """Every source file of the package by its dotted name."""
    paths = sorted(PACKAGE.rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


@cache
def tree(name: str) -> ast.Module:
    """A source file, parsed."""
    return ast.parse(files()[name].read_text(encoding="utf-8"), name)


def wing_of(name: str) -> str:
    """The wing that a file belongs to, or its own name at the top."""
    return [*name.split("."), "__init__"][1]


def imported(name: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all imports, those inside functions and for types too."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, each.name) for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((node.lineno, f"{node.module}.{each.name}") for each in node.names)


@cache
def uses(name: str) -> frozenset[str]:
    """The package's files that a file imports; an imported name counts for the file that holds it."""
    targets = set()
    for _, dotted in imported(name):
        owner = dotted if dotted in files() else dotted.rpartition(".")[0]
        if owner in files() and owner not in (name, "placement"):
            targets.add(owner)
    return frozenset(targets)


def calls(name: str) -> Iterator[tuple[int, ast.Call]]:
    """(line, call) of every call."""
    return ((node.lineno, node) for node in ast.walk(tree(name)) if isinstance(node, ast.Call))


def test_the_table_lists_every_wing_once() -> None:
    """The folders of the package are the table's rows."""
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(wings())


def test_the_package_has_few_names_at_its_top() -> None:
    """A newcomer sees the wings and a handful of files beside them, no more."""
    names = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert names == TOP | set(wings())
    assert len(names - {"__init__", "__main__"}) <= MOST_AT_THE_TOP


@pytest.mark.parametrize("wing", list(wings()))
def test_a_wing_may_import_only_wings_above_it(wing: str) -> None:
    """What a row allows stands in the rows above it, so no wing imports upward and there is no circle of wings."""
    above = list(wings())[: list(wings()).index(wing)]
    assert [each for each in wings()[wing] if each not in above] == []


@pytest.mark.parametrize("name", list(files()))
def test_a_file_imports_only_what_its_wing_may(name: str) -> None:
    """No import between wings that the table does not have; the top is for all, `api` for users alone."""
    wing = wing_of(name)
    if wing in ("api", "__init__", "__main__"):
        return
    allowed = {wing, *wings().get(wing, ()), *(BESIDE - {"api"}), "__init__"}
    assert sorted(each for each in uses(name) if wing_of(each) not in allowed) == []


def test_no_file_imports_itself_through_others() -> None:
    """Imports between files, lazy ones too, form no circle; and the longest chain of them is short."""
    depths: dict[str, int] = {}
    walked: list[str] = []

    def depth(name: str) -> int:
        assert name not in walked, " <- ".join([*walked[walked.index(name) :], name])
        if name not in depths:
            walked.append(name)
            depths[name] = 1 + max(map(depth, uses(name)), default=0)
            walked.pop()
        return depths[name]

    assert max(map(depth, files())) <= LONGEST_CHAIN


def test_a_public_name_means_one_thing() -> None:
    """No two files define the same public class, function or constant; a command's function is `command`."""
    places = defaultdict(set)
    for name in files():
        for node in tree(name).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            results = [each.id for each in targets if isinstance(each, ast.Name)]
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                results.append(node.name)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                results.append(node.target.id)
            for each in results:
                if not each.startswith("_") and each != "command":
                    places[each].add(name)
    assert {name: sorted(where) for name, where in places.items() if len(where) > 1} == {}


@pytest.mark.parametrize(("library", "owner"), OWNERS.items())
def test_a_library_has_one_importer(library: str, owner: str) -> None:
    """Only its owner imports a library that is a seam to something foreign."""
    users = {
        wing_of(name)
        for name in files()
        for _, dotted in imported(name)
        if dotted.partition(".")[0] == library
    }
    assert users == {owner}


def test_a_library_imported_is_a_dependency() -> None:
    """What the package imports is what its installation brings, and no more."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {re.split("[<>=]", each)[0] for each in project["dependencies"]}
    tops = {dotted.partition(".")[0] for name in files() for _, dotted in imported(name)}
    libraries = tops - sys.stdlib_module_names - {"placement"}
    known = packages_distributions()
    assert wanted == {known[name][0].lower().replace("_", "-") for name in libraries}


def test_only_the_command_line_prints_or_exits() -> None:
    """No print, exit or SystemExit outside cli."""
    results = [
        f"{name}:{line}"
        for name in files()
        for line, call in calls(name)
        if wing_of(name) != "cli"
        and ast.unparse(call.func) in ("print", "exit", "sys.exit", "SystemExit", "os._exit")
    ]
    assert results == []


def test_nothing_goes_through_a_shell() -> None:
    """Programs get their arguments as a list: no shell=True and no os.system."""
    results = [
        f"{name}:{line}"
        for name in files()
        for line, call in calls(name)
        if ast.unparse(call.func) in ("os.system", "os.popen")
        or any(word.arg == "shell" for word in call.keywords)
    ]
    assert results == []


def test_everything_public_is_documented() -> None:
    """Every module, public class, function and method says what it is."""
    bare = []
    for name in files():
        module = tree(name)
        bare += [name] if not ast.get_docstring(module) and module.body else []
        for node in module.body:
            is_class = isinstance(node, ast.ClassDef) and not node.name.startswith("_")
            inner = node.body if is_class else []
            for each in (node, *inner):
                is_public = isinstance(each, ast.ClassDef | ast.FunctionDef) and not each.name.startswith("_")
                if is_public and not ast.get_docstring(each) and not _is_stub(each):
                    bare.append(f"{name}.{each.name}")
    assert bare == []


def _is_stub(node: ast.AST) -> bool:
    """A protocol's method: its body is `...`."""
    return isinstance(node, ast.FunctionDef) and ast.unparse(node.body[-1]) == "..."


PROCESS_CALLS = frozenset(
    {"sys.setrecursionlimit", "locale.setlocale", "warnings.filterwarnings", "warnings.simplefilter"}
    | {"os.chdir", "os.umask", "os.putenv", "os.unsetenv", "os.environ.update", "os.environ.setdefault"}
    | {"setattr", "object.__setattr__"}
)
BROAD = frozenset(
    {"BaseException", "Exception", "TypeError", "LookupError", "ArithmeticError", "AttributeError"}
)
FOREIGN = "what another program printed may have any shape"
JUSTIFIED = {
    ("cli/__init__.py", "gc"): "the command owns its process",
    ("files.py", "os.umask"): "it can only be read by setting it, and is put back at once",
    ("inputs/gguf_header/write.py", "os.umask"): "it can only be read by setting it, and is put back at once",
    ("engine/logs.py", "except TypeError"): FOREIGN,
    ("engine/serve.py", "except TypeError"): FOREIGN,
    ("engine/serve.py", "except Exception"): "the server is being ended: nothing may stop that",
    ("measure/probe.py", "except TypeError"): FOREIGN,
    ("inputs/gguf_header/write.py", "except TypeError"): "struct.pack says so of a value of another type",
    ("inputs/gguf_header/write.py", "except AttributeError"): "a value that is no text has no encode",
    (
        "inputs/model_files/description.py",
        "except TypeError",
    ): "struct.pack says so of a value of another type",
    (
        "measure/verify/watch.py",
        "except Exception",
    ): "psutil raises anything in a container that hides /proc/vmstat",
}


def caught(node: ast.AST) -> Iterator[str]:
    """The names of the exceptions that an `except` or a `suppress` stops; a bare one stops BaseException."""
    if isinstance(node, ast.ExceptHandler):
        last = node.body[-1]
        if isinstance(last, ast.Raise) and last.exc is None:
            return  # it tidies up and lets the exception go on
        types: list[ast.expr | None] = [node.type]
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
        types = [*node.args]
    else:
        return
    for each in types:
        parts = each.elts if isinstance(each, ast.Tuple) else [each]
        yield from ("BaseException" if part is None else ast.unparse(part) for part in parts)


def liberties(path: str, module: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, what) of all that changes the process, reaches into other objects or hides a bug of ours."""
    for node in ast.walk(module):
        line = getattr(node, "lineno", 0)
        yield from ((line, f"except {name}") for name in caught(node) if name in BROAD)
        if isinstance(node, ast.Attribute) and node.attr == "__dict__":
            yield line, "__dict__"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in PROCESS_CALLS or (
                name == "signal.signal" and path.split("/")[0] not in ("engine", "cli")
            ):
                yield line, name
        is_written = isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load)
        if is_written and ast.unparse(node.value) == "os.environ":
            yield line, "os.environ"
    for node in ast.walk(module):
        names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from ((getattr(node, "lineno", 0), "gc") for name in names if name == "gc")


def all_liberties() -> list[tuple[str, int, str]]:
    """(file, line, what) of the whole package."""
    names = {name: path.relative_to(PACKAGE).as_posix() for name, path in files().items()}
    return [(names[name], *each) for name in files() for each in liberties(names[name], tree(name))]


def test_no_call_changes_the_process_or_hides_a_bug() -> None:
    """No gc, no signal handler or environment of the caller's, no cache in another object's `__dict__`, and no
    `except` that is wide enough to take a bug of ours for an answer, but for those with a reason."""
    assert [each for each in all_liberties() if (each[0], each[2]) not in JUSTIFIED] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import gc", "gc"),
        ("from gc import disable", "gc"),
        ("model.__dict__['kept'] = 1", "__dict__"),
        ("os.environ['A'] = 'b'", "os.environ"),
        ("del os.environ['A']", "os.environ"),
        ("signal.signal(15, stop)", "signal.signal"),
        ("try: f()\nexcept: pass", "except BaseException"),
        ("try: f()\nexcept (OSError, LookupError): pass", "except LookupError"),
        ("with contextlib.suppress(OSError, TypeError): f()", "except TypeError"),
        ("object.__setattr__(a, 'b', 1)", "object.__setattr__"),
    ],
)
def test_a_liberty_is_seen(text: str, expected: str) -> None:
    """Each kind has an example that the scan finds."""
    assert [what for _, what in liberties("compute.py", ast.parse(text))] == [expected]


@pytest.mark.parametrize(
    "text", ["os.environ['A']", "try: f()\nexcept KeyError: pass", "try: f()\nexcept: raise"]
)
def test_reading_is_no_liberty(text: str) -> None:
    """Looking at the process, or catching what a call is known to raise, changes nothing."""
    assert list(liberties("compute.py", ast.parse(text))) == []


# words that the glossary replaced, as parts of names
_OLD_PART = re.compile(
    r"ways?|leads?|hopes?|outlook|promise[sd]?|freedom|wish(es|ed)?|granted|settle[sd]?|settling|closer|judge[sd]?|"
    r"rivals?|telling|survey(ed)?|chosen|presets|front|found",
    re.IGNORECASE,
)
OLD_PARTS_KEPT = {"FileNotFoundError": "Python's own", "pareto_front": "the field's word, whole"}
# of those the ones that plain English does without, in docstrings, comments and messages
_OLD_PROSE = re.compile(
    r"\b(hop(e|es|ed)|outlooks?|freedoms?|wish(es|ed)?|granted|judg(e|es|ed|ing)|rivals?|telling|"
    r"survey(s|ed)?|(?<!pareto )front)\b",
    re.IGNORECASE,
)


def identifiers(module: ast.Module) -> Iterator[str]:
    """Every name that the source defines, uses or imports; those inside f-strings too."""
    for node in ast.walk(module):
        for _, value in ast.iter_fields(node) if not isinstance(node, ast.Constant) else ():
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, str):
                    yield from each.split(".")


def old_names(names: Iterable[str]) -> list[str]:
    """The names of which a part, split at _ and at capitals, is a word that was replaced."""
    parts = {name: re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name) for name in {*names} - {*OLD_PARTS_KEPT}}
    return sorted(name for name, each in parts.items() if any(map(_OLD_PART.fullmatch, each)))


def old_prose(text: str) -> list[str]:
    """The words in a source that were replaced, wherever its lines break."""
    return [match[0] for match in _OLD_PROSE.finditer(re.sub(r"[\s#]+", " ", text))]


@pytest.mark.parametrize("name", list(files()))
def test_a_source_has_the_words_of_the_glossary(name: str) -> None:
    """No file, no name and no docstring, comment or message has a word that was replaced."""
    text = files()[name].read_text(encoding="utf-8")
    assert (old_names([*name.split("."), *identifiers(tree(name))]), old_prose(text)) == ([], [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def _best_way(): pass", ["_best_way"]),
        ("class LeadTable: pass", ["LeadTable"]),
        ("f(wishes=1)", ["wishes"]),
        ("f'{kept.found}'", ["found"]),
        ("from a.outlook import b", ["outlook"]),
        ("FRONT_GAP = 1", ["FRONT_GAP"]),
        ("pareto_front, leading, always = FileNotFoundError, 'found', 'way'", []),
    ],
)
def test_an_old_name_is_seen(text: str, expected: list[str]) -> None:
    """Part of a name, a keyword, an attribute in an f-string and a module count; text and longer words do not."""
    assert old_names(identifiers(ast.parse(text))) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# what the user Wished", ["Wished"]),
        ("# the Pareto\n# front", []),
        ("print('on the front')", ["front"]),
        ("is_settled = hopeless", []),
    ],
)
def test_old_prose_is_seen(text: str, expected: list[str]) -> None:
    """Whole words count, whatever their case and the line break before them."""
    assert old_prose(text) == expected
