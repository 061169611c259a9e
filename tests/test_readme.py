"""README against the program: its commands, files, paths and codes are the real ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from placement import errors
from placement.cli import cli
from placement.machine_files import read_machine
from placement.model_files import load_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text below a heading, up to the next one of its kind."""
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def commands(command: click.Command = cli, name: str = "place") -> dict[str, click.Command]:
    """`place` and every command and subcommand by what is typed."""
    found = {name: command}
    if isinstance(command, click.Group):
        context = click.Context(command)
        for word in command.list_commands(context):
            below = command.get_command(context, word)
            assert below is not None
            found |= commands(below, f"{name} {word}")
    return found


def examples() -> list[str]:
    """Every `place …` line of README: those that run, and those that help texts show."""
    lines = re.findall(r"^(?:  +|\$ |.* \.venv/bin/)(place [a-z].*)$", README, re.MULTILINE)
    return [line.partition(" > ")[0] for line in lines if not line.startswith("place --")]


def test_every_command_has_its_help_in_the_readme() -> None:
    """Each command and subcommand has a heading, and each heading is a command."""
    assert re.findall(r"^### (place.*)$", section("Commands"), re.MULTILINE) == list(commands())


@pytest.mark.parametrize("line", sorted(set(examples())))
def test_an_example_is_accepted_as_typed(line: str) -> None:
    """The command line parses: commands, options and values are of today."""
    words = shlex.split(line)[1:]
    command: click.Command = cli
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), words.pop(0))
        assert found is not None
        command = found
    assert command.make_context("place", words).params


def test_every_option_says_what_it_does() -> None:
    """No option of any command stands without a help text."""
    found = [
        f"{name} {option.opts[0]}"
        for name, command in commands().items()
        for option in command.params
        if isinstance(option, click.Option) and not option.help
    ]
    assert found == []


def test_every_command_shows_an_example() -> None:
    """Each heading's help ends with a line that runs."""
    texts = re.split(r"^### ", section("Commands"), flags=re.MULTILINE)[1:]
    assert [text.partition("\n")[0] for text in texts if not re.search(r"Examples?:\n +place ", text)] == []


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:tests|benchmarks|\.ci)/[\w./]+\w", README))))
def test_a_path_named_exists(path: str) -> None:
    """What README points to is in the repository."""
    assert (ROOT / path).exists()


def test_the_machine_file_shown_is_one(tmp_path: Path) -> None:
    """The example of a machine file is read as it stands."""
    shown = re.findall(r"```toml\n(.*?)```", section("Files"), re.DOTALL)[1]
    path = tmp_path / "mine.toml"
    path.write_text(shown, encoding="utf-8")
    assert read_machine(path).device("CUDA0").link_gb_per_s == 25


def test_the_description_shown_is_one(tmp_path: Path) -> None:
    """The example of a model description is read as it stands."""
    shown = re.findall(r"```toml\n(.*?)```", section("Files"), re.DOTALL)[0]
    path = tmp_path / "glm.toml"
    path.write_text(shown, encoding="utf-8")
    assert len(load_model(str(path)).tensors) == 46


def test_every_exit_code_is_explained() -> None:
    """The table has the code of every exception that ends a command."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    explained = set(map(int, re.findall(r"^\| (\d+) \|", section("Exit codes"), re.MULTILINE)))
    assert {kind.exit_code for kind in kinds} <= explained


NEEDS_FILES_OF_THE_USER = (
    "calibrate",
    "engine",
    "import",
    "probe",
    "tune",
    "verify",
)  # weights, runs, a llama.cpp of theirs


@pytest.mark.parametrize(
    "line",
    [line for line in sorted(set(examples())) if not {*line.split()[1:3]} & {*NEEDS_FILES_OF_THE_USER}],
)
def test_an_example_runs(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a help text shows can be typed: it runs in an empty folder (with a models.conf) and ends well."""
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
