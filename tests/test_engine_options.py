"""The one table of llama.cpp's options, and that nothing else in the package lists them again."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from placement.configs.models_conf.measured import PLACEMENT_FIELDS
from placement.configs.models_conf.models_conf import KEY_OPTIONS
from placement.configs.models_conf.options import by_option, placement_option
from placement.engine.flags import read_flags
from placement.inputs.engine_options import (
    LOAD_MODE_AS_OLDER_FLAGS,
    LOAD_MODES,
    OLDER_LOAD_FLAGS,
    OPTION_BY_NAME,
    OPTIONS,
    EngineOption,
    is_option,
    names_of,
)
from placement.inputs.quants import KV_CACHE_TYPES
from placement.llamacpp.arguments import Arguments, parse
from placement.measure.verify.candidates import without_placement

PACKAGE = Path(__file__).parent.parent / "placement"
TABLE = PACKAGE / "inputs" / "engine_options.py"
GOOD = {
    "flag": [], "number": ["3"], "gpu_layers": ["all"], "shares": ["3,1"], "devices": ["CUDA0"],
    "servers": ["box:50052"], "overrides": ["exps=CPU"], "first_layers": ["2"], "slots": ["2"],
    "switch": ["off"], "flash": ["off"], "sizes": ["512"], "text": ["a.gguf"],
}  # fmt: skip


def good_value(option: EngineOption) -> list[str]:
    """A value that the engine takes for the option, as words."""
    return [option.allowed[0]] if option.value == "word" else GOOD[option.value]


def sources() -> Iterator[tuple[str, set[str]]]:
    """Every other module of the package with the texts that stand in it as whole constants."""
    for path in PACKAGE.rglob("*.py"):
        if path == TABLE:
            continue
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        texts = {
            node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        yield str(path.relative_to(PACKAGE)), texts


def test_names_are_the_tables_alone() -> None:
    """No other module holds two names of one option: it would be a second table."""
    results = [
        (where, option.name)
        for where, texts in sources()
        for option in OPTIONS
        if len(texts & set(option.names)) > 1 or len(texts & set(option.off_names)) > 1
    ]
    assert results == []


def test_variables_are_the_tables_alone() -> None:
    """No other module names a variable of an option."""
    named = {option.variable for option in OPTIONS if option.variable and "_" in option.variable}
    variables = named | {"LLAMA_ARG_"}  # short ones are ordinary words too
    assert [(where, texts & variables) for where, texts in sources() if texts & variables] == []


def test_what_is_emitted_stands_in_the_table() -> None:
    """Every option that a placement is written with is one of the table, under the name that we write."""
    texts = next(texts for where, texts in sources() if where == "llamacpp/emit/arguments.py")
    written = {text for text in texts if text.startswith("-") and " " not in text}
    known = {option.name for option in OPTIONS} | {name for option in OPTIONS for name in option.off_names}
    assert written - known == set()


def test_names_are_unique() -> None:
    """A name belongs to one option, and to one side of it."""
    assert len(OPTION_BY_NAME) == sum(len(option.names) + len(option.off_names) for option in OPTIONS)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_the_parser_reads_every_row(option: EngineOption) -> None:
    """Each name of a row sets the row's field, and nothing is left over."""
    said = [parse([name, *good_value(option)]) for name in option.names]
    silent = Arguments()
    changed = {
        field.name
        for each in said
        for field in dataclasses.fields(Arguments)
        if getattr(each, field.name) != getattr(silent, field.name)
    }
    assert changed == {option.field}


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_the_variable_says_what_the_option_says(option: EngineOption) -> None:
    """A variable of a row is read as the option itself is."""
    value = good_value(option)
    env = {f"LLAMA_ARG_{option.variable}": value[0] if value else "on"} if option.variable else {}
    assert parse([option.name, *value] if option.variable else []) == parse([], env)


def test_every_field_of_arguments_has_an_option() -> None:
    """What `Arguments` holds of placement is what the table sets."""
    fields = {field.name for field in dataclasses.fields(Arguments)}
    assert fields - {option.field for option in OPTIONS} == {"program", "other", "removed"}


def test_profiles_replace_the_placement_options() -> None:
    """The options that a choice replaces are those that place, and the threads that a placement may fix."""
    names = [name for name in (*OPTION_BY_NAME, *OLDER_LOAD_FLAGS) if placement_option(name)[0] is None]
    assert names == ["-tb", "--threads-batch", "-m", "--model"]


def test_profiles_call_an_option_by_its_name() -> None:
    """Every spelling comes to the name that the choice is written with."""
    spelt = {
        name: next(iter(by_option([name, *good_value(OPTION_BY_NAME[name])]))) for name in OPTION_BY_NAME
    }
    kept = {"-tb", "--threads-batch", "-m", "--model"}
    assert spelt == {name: name if name in kept else OPTION_BY_NAME[name].name for name in OPTION_BY_NAME}


def test_keys_of_a_models_conf_are_the_variables() -> None:
    """Every variable of an option with a value is a key, and says what the variable says."""
    said = {
        key: parse([name, *good_value(OPTION_BY_NAME[name])]) == parse([], {f"LLAMA_ARG_{key}": value[0]})
        for key, name in KEY_OPTIONS.items()
        if (value := good_value(OPTION_BY_NAME[name]))
    }
    assert said == {option.variable: True for option in OPTIONS if option.variable and option.has_value}


def test_what_is_compared_is_what_places() -> None:
    """Measured runs are told by what places, not by threads or the file."""
    left = {field.name for field in dataclasses.fields(Arguments)} - set(PLACEMENT_FIELDS)
    assert left == {"n_threads", "n_threads_batch", "model_path", "program", "other", "removed"}


def test_fit_decides_every_place() -> None:
    """No option that puts something somewhere is left beside `--fit`."""
    placing = [option for option in OPTIONS if option.role == "place"]
    words = [word for option in placing for name in option.names for word in (name, *good_value(option))]
    assert without_placement([*words, "-c", "4096", "--jinja"]) == ("-c", "4096", "--jinja")


def test_kv_types_are_those_of_the_cache() -> None:
    """What -ctk and -ctv take is one list."""
    assert [OPTION_BY_NAME[name].allowed for name in names_of("-ctk", "-ctv")] == [KV_CACHE_TYPES] * 4


def test_older_flags_mean_load_modes() -> None:
    """The flags of older builds stand for modes that there are, and each mode that they can say comes back."""
    assert set(OLDER_LOAD_FLAGS.values()) | set(LOAD_MODE_AS_OLDER_FLAGS) == set(LOAD_MODES)
    said = {mode: flags for mode, flags in LOAD_MODE_AS_OLDER_FLAGS.items() if len(flags) == 1}
    assert said == {OLDER_LOAD_FLAGS[flag]: (flag,) for flag in ("--no-mmap", "--mlock")}


def test_an_older_build_gets_flags_of_the_same_meaning() -> None:
    """Locking without mapping takes both flags on a build without -lm."""
    older = read_flags("--mlock  lock\n--no-mmap  do not map\n")
    assert older.spell(["-lm", "mlock", "--load-mode", "mmap+mlock"]) == ("--no-mmap", "--mlock", "--mlock")


@pytest.mark.parametrize(
    ("word", "expected"), [("-c", True), ("-", False), ("-1", False), ("-.5", False), ("x", False)]
)
def test_what_begins_an_option(word: str, expected: bool) -> None:
    """Numbers and a lone dash are values, for the parser and for profiles alike."""
    assert expected == is_option(word)
