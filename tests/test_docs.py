"""README and docs/ against the program: their commands, files, links, paths and codes are the real ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from placement import errors
from placement.cli import cli
from placement.configs.models_conf.models_conf import parse_models_conf
from placement.inputs.machine_files import read_machine
from placement.inputs.model_files.files import read_model

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = PAGES["README.md"]
MOST_LINES, MOST_PICTURE_BYTES = 200, 200_000
_BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
PACKAGE = ROOT / "placement"
# words that the glossary replaced
_OLD_WORDS = re.compile(
    r"\b(way|ways|lead|leads|hope|hopes|outlook|freedom|wish|wishes|granted|settles?|judges?|rivals?|telling|"
    r"surveys?|(?<!pareto )front)\b",
    re.IGNORECASE,
)
_WING = re.compile(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \| ([^|]*) \|$", re.MULTILINE)


def section(page: str, title: str) -> str:
    """The text below a heading of a page, up to the next one of its kind."""
    marks, _, _ = title.partition(" ")
    return PAGES[page].partition(f"\n{title}\n")[2].partition(f"\n{marks} ")[0]


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in that language."""
    return [text for kind, text in _BLOCK.findall(PAGES[page]) if kind == language]


def commands(command: click.Command = cli, name: str = "place") -> dict[str, click.Command]:
    """`place` and every command and subcommand by what is typed."""
    results = {name: command}
    if isinstance(command, click.Group):
        context = click.Context(command)
        for word in command.list_commands(context):
            below = command.get_command(context, word)
            assert below is not None
            results |= commands(below, f"{name} {word}")
    return results


def resolved(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that words after `place` name, and the words that are left for it."""
    command: click.Command = cli
    while isinstance(command, click.Group) and words:
        result = command.get_command(click.Context(command), words[0])
        assert result is not None, words
        command, words = result, words[1:]
    return command, words


def examples() -> list[str]:
    """Every `place …` line in a code block: those that run, and those that help texts show."""
    code = "\n".join(text for page in PAGES.values() for _, text in _BLOCK.findall(page))
    lines = re.findall(r"^(?:  +|\$ |.* \.venv/bin/)?(place [a-z].*)$", code, re.MULTILINE)
    shown = (re.split(r" > |  +#", line)[0].rstrip() for line in lines if not line.startswith("place --"))
    return sorted(set(shown))


def anchors(text: str) -> set[str]:
    """What links may point to in a page: its headings as GitHub and MyST spell them."""
    headings = re.findall(r"^#+ (.*)$", _BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links() -> list[tuple[str, str]]:
    """(page, target) of every link and picture within the repository."""
    results = [
        (page, target)
        for page, text in PAGES.items()
        for target in re.findall(r"\]\(([^)\s]+)\)", _BLOCK.sub("", text))
    ]
    return [(page, target) for page, target in results if "://" not in target]


def named_paths() -> list[str]:
    """Every path of the repository that a page names."""
    pattern = r"(?<![\w/.-])(?:tests|benchmarks|docs|\.ci)/[\w./-]*\w"
    return sorted({path for text in PAGES.values() for path in re.findall(pattern, text)})


def tables() -> dict[str, list[tuple[str, str]]]:
    """The rows (names, text) of each module table of the architecture, by the wing that its heading names."""
    part = section("docs/architecture.md", "## What each module does")
    texts = re.split(r"^### ", part, flags=re.MULTILINE)[1:]
    return {
        text.partition("\n")[0]: re.findall(r"^\| (`.*?) \| (.*) \|$", text, re.MULTILINE) for text in texts
    }


def backticked(text: str) -> list[str]:
    """What stands in backticks and may be a module or a folder."""
    return re.findall(r"`(\w+/?)`", text)


def modules(folder: Path) -> list[str]:
    """The modules and, with a slash, the packages that a folder has."""
    folders = [path.parent.name + "/" for path in folder.glob("*/__init__.py")]
    return sorted([*folders, *(path.stem for path in folder.glob("*.py") if path.stem != "__init__")])


WINGS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
FOLDERS = sorted(f"{path.parent.parent.name}/{path.parent.name}" for path in PACKAGE.glob("*/*/__init__.py"))


def test_readme_is_short() -> None:
    """README holds the essentials; the rest is in docs/."""
    assert len(README.splitlines()) <= MOST_LINES


def test_every_command_has_its_help_in_the_docs() -> None:
    """Each command and subcommand has a heading in docs/cli.md, and each heading is a command."""
    assert re.findall(r"^### (place.*)$", PAGES["docs/cli.md"], re.MULTILINE) == list(commands())


def test_every_command_shows_an_example() -> None:
    """Each heading's help ends with a line that runs."""
    texts = re.split(r"^### ", section("docs/cli.md", "## Every command"), flags=re.MULTILINE)[1:]
    assert [text.partition("\n")[0] for text in texts if not re.search(r"Examples?:\n +place ", text)] == []


def test_every_option_says_what_it_does() -> None:
    """No option of any command stands without a help text."""
    results = [
        f"{name} {option.opts[0]}"
        for name, command in commands().items()
        for option in command.params
        if isinstance(option, click.Option) and not option.help
    ]
    assert results == []


@pytest.mark.parametrize("line", examples())
def test_an_example_is_accepted_as_typed(line: str) -> None:
    """The command line parses: commands, options and values are of today."""
    command, words = resolved(shlex.split(line)[1:])
    assert command.make_context("place", words).command is command


@pytest.mark.parametrize("page", PAGES)
def test_a_command_named_in_a_sentence_exists(page: str) -> None:
    """`place WORD` anywhere in a text is a command of today, with options of its own."""
    for words in re.findall(r"`place ([a-z][^`]*)`", _BLOCK.sub("", PAGES[page])):
        command, left = resolved(shlex.split(words))
        options = {name for option in command.params for name in option.opts}
        assert {word for word in left if word.startswith("--")} <= options, words


@pytest.mark.parametrize("path", named_paths())
def test_a_path_named_exists(path: str) -> None:
    """What a page points to is in the repository."""
    assert (ROOT / path).exists()


@pytest.mark.parametrize(("page", "target"), links())
def test_a_link_leads_somewhere(page: str, target: str) -> None:
    """The file that is linked is there, and so is the heading."""
    name, _, anchor = target.partition("#")
    path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
    assert path.is_file()
    assert not anchor or anchor in anchors(path.read_text(encoding="utf-8"))


def test_every_page_is_reached_from_readme() -> None:
    """README's list has every page of docs/ that stands in its table of contents."""
    listed = re.findall(
        r"^([a-z-]+)$",
        "\n".join(re.findall(r"```\{toctree\}(.*?)```", PAGES["docs/index.md"], re.DOTALL)),
        re.MULTILINE,
    )
    linked = re.findall(r"\]\(docs/([a-z-]+)\.md\)", section("README.md", "## Documentation"))
    assert sorted(linked) == sorted([*listed, "index"])


def test_the_machine_file_shown_is_one(tmp_path: Path) -> None:
    """The example of a machine file is read as it stands."""
    path = tmp_path / "mine.toml"
    path.write_text(blocks("docs/files.md", "toml")[1], encoding="utf-8")
    assert read_machine(path).device("CUDA0").link_gb_per_s == 25


def test_the_description_shown_is_one(tmp_path: Path) -> None:
    """The example of a model description is read as it stands."""
    path = tmp_path / "glm.toml"
    path.write_text(blocks("docs/files.md", "toml")[0], encoding="utf-8")
    assert len(read_model(str(path)).tensors) == 46


def test_the_models_conf_shown_is_one() -> None:
    """The example of a models.conf is read without a problem, and has its arguments."""
    conf = parse_models_conf(blocks("docs/files.md", "ini")[0].encode())
    assert ([each.name for each in conf.sections], list(conf.problems)) == (["gpt-oss-120b"], [])


@pytest.mark.parametrize(
    ("page", "title"), [("README.md", "## Exit codes"), ("docs/cli.md", "### Exit codes")]
)
def test_every_exit_code_is_explained(page: str, title: str) -> None:
    """The table has the code of every exception that ends a command."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    explained = set(map(int, re.findall(r"^\| (\d+) \|", section(page, title), re.MULTILINE)))
    assert {kind.exit_code for kind in kinds} <= explained


def test_readme_sums_up_the_table_of_accuracy() -> None:
    """README's two rows are the totals of the full table: plans, worst MiB, and wrong numbers of splits."""
    full = re.findall(r"^\| ([^|]+) \| all \|(.*)\|$", PAGES["docs/accuracy.md"], re.MULTILINE)
    totals = {name: [int(cell) for cell in cells.split("|")] for name, cells in full}
    short = re.findall(
        r"^\| ([^|]+) \|((?: \d+ \|){5})$", section("README.md", "## How sure the numbers are"), re.MULTILINE
    )
    assert {name: [int(cell) for cell in cells.split("|")[:-1]] for name, cells in short} == {
        name: [*cells[:4], sum(cells[5:])] for name, cells in totals.items()
    }


def test_the_python_shown_is_the_same_everywhere() -> None:
    """README and docs/python.md begin with one program."""
    assert blocks("README.md", "python") == blocks("docs/python.md", "python")


def test_the_python_shown_runs() -> None:
    """README's program runs as it stands."""
    names: dict[str, Any] = {}
    exec(blocks("README.md", "python")[0], names)
    assert names["best"].command.startswith("llama-server ")


@pytest.mark.parametrize("wing", WINGS)
def test_every_module_of_a_wing_is_on_the_map(wing: str) -> None:
    """A wing's table has all its modules and folders, and no others."""
    named = [name for names, _ in tables()[wing] for name in backticked(names)]
    assert sorted(named) == modules(PACKAGE / wing)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_module_of_a_folder_is_on_the_map(folder: str) -> None:
    """A folder's row has all its modules; the graph's stands in a table of its own."""
    wing, _, name = folder.partition("/")
    rows = tables()["The graph" if folder == "llamacpp/graph" else wing]
    text = dict(rows)[f"`{name}/`"]
    there = set(modules(PACKAGE / folder))
    assert there - set(backticked(text)) == set()
    assert set(re.findall(r"`(\w+)`(?=[:,]| and `)", text)) <= there


@pytest.mark.parametrize("wing", [wing for wing in WINGS if wing != "cli"])
def test_the_wings_table_has_every_module(wing: str) -> None:
    """The short table lists the same modules and folders; cli, whose commands are many, is left out."""
    row = re.search(rf"^\| `{wing}` \| [^|]+ \| ([^|]+) \|", PAGES["docs/architecture.md"], re.MULTILINE)
    assert row is not None
    assert sorted(backticked(row[1])) == modules(PACKAGE / wing)


def test_what_stands_beside_the_wings_is_on_the_map() -> None:
    """The last table has the modules at the package's top."""
    named = [name for names, _ in tables()["Beside the wings"] for name in backticked(names)]
    assert sorted(named) == [each for each in modules(PACKAGE) if not each.endswith("/")]


def test_a_module_to_change_exists() -> None:
    """Each path that "Where do I change" names is a module or a folder."""
    text = section("docs/architecture.md", "## Where do I change …")
    paths = [path for path in re.findall(r"`(\w+(?:/\w+)+)`", text) if not path.startswith("tests/")]
    assert [p for p in paths if not ((PACKAGE / f"{p}.py").is_file() or (PACKAGE / p).is_dir())] == []


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_a_page_has_the_words_of_the_glossary(page: str) -> None:
    """No page uses a word that was replaced; of the changes those of the next version count."""
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    text = PAGES.get(page) or changes.partition("## [Unreleased]")[2].partition("\n## [")[0]
    assert [match[0] for match in _OLD_WORDS.finditer(_BLOCK.sub("", text))] == []


def test_the_wings_are_drawn_in_order() -> None:
    """Eight rows; each wing may import only what stands above it, the last one all."""
    wings = {name: re.findall(r"\w+", may) for name, may in _WING.findall(PAGES["docs/architecture.md"])}
    names = list(wings)
    assert names == ["inputs", "llamacpp", "engine", "predict", "solve", "measure", "configs", "cli"]
    assert wings.pop("cli") == ["all"]
    assert all(set(may) <= set(names[: names.index(name)]) for name, may in wings.items())


def test_the_picture_is_what_its_command_draws(tmp_path: Path) -> None:
    """The command that README names draws the committed picture, which is small enough for a page."""
    line = next(each for each in examples() if " --svg " in each)
    words = shlex.split(line)[1:]
    assert words[-1] == "docs/images/layer-map.svg"
    drawn = tmp_path / "map.svg"
    assert CliRunner().invoke(cli, [*words[:-1], str(drawn)]).exit_code == 0
    assert drawn.read_bytes() == (ROOT / words[-1]).read_bytes()
    assert drawn.stat().st_size < MOST_PICTURE_BYTES


# what needs weights, runs, or a llama.cpp of the user's; and the picture, which is drawn above
NEEDS_FILES_OF_THE_USER = {"calibrate", "engine", "import", "probe", "tune", "verify", "my-model"}
NOT_RUN = {*NEEDS_FILES_OF_THE_USER, "--svg"}


@pytest.mark.parametrize("line", [line for line in examples() if not {*line.split()} & NOT_RUN])
def test_an_example_runs(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pages show can be typed: it runs in an empty folder (with a models.conf) and ends well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("PLACE_ENGINE", "off")
    section = "CTX_SIZE=131072\nN_GPU_LAYERS=99\nFIT=on\nEXTRA_ARGS=--jinja -np 1\n"
    (tmp_path / "models.conf").write_text(
        f"[glm-flash-q4]\n{section}\n[gpt-oss-120b]\n{section}", encoding="utf-8"
    )
    result = CliRunner().invoke(cli, shlex.split(line)[1:])
    over_a_cap = "-ot blk" in line or line.startswith("place check glm-flash ")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    assert result.exit_code == 0 or (over_a_cap and result.exit_code == 1), result.output
