"""What the cog blocks of README.md and docs/*.md write: help texts, examples with their output, tables.

cog runs with `-I docs`, so that a block says `import cog_helpers`. Each text is made once in a run.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import click

from placement.cli import cli
from placement.inputs.coefficients import DEFAULTS
from placement.inputs.machine_files import REFERENCE_MACHINE, resolve_machine

SOLVE = "place solve qwen3-coder-q5 --ctx 262144 --machine rtx4090-rtx5070ti --engine off"
CHECK = (
    "place check qwen3-coder-q5 --machine rtx4090-rtx5070ti --engine off --args '-ngl 99 -c 262144 -b 2048 -ub 2048 "
    r"-ctk q8_0 -ctv q8_0 -ot blk\.([0-9]|1[0-4])\.=CUDA0,blk\.(1[5-9]|2[0-1])\.=CUDA1,exps=CPU'"
)
EXPLAIN = "place explain qwen3-coder-q5 --machine rtx4090-rtx5070ti"
_KEPT = ("PATH", "HOME", "PYTHONPATH")
_MAIN = "import sys; sys.argv[0] = 'place'; from placement.cli import main; main()"


@functools.cache
def shown(words: tuple[str, ...]) -> str:
    """What `place WORDS` prints in an empty folder, as from a terminal of 100 columns."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", _MAIN, *words],
            cwd=folder,
            env={**kept, "COLUMNS": "100"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    assert done.returncode in (0, 1) and not done.stderr, done
    return "\n".join(line.rstrip() for line in done.stdout.rstrip().splitlines())


def example(line: str, n_rows: int | None = None) -> str:
    """A command line with its output, as a block; of a table's rows the first `n_rows`."""
    text = shown(tuple(shlex.split(line)[1:]))
    return f"```console\n$ {line}\n{text if n_rows is None else _first_rows(text, n_rows)}\n```"


def _first_rows(text: str, n_rows: int) -> str:
    """The text with only the first rows of its table; a row may run over several lines."""
    head, rule, rest = re.split(r"(^ ─+\n)", text, maxsplit=1, flags=re.MULTILINE)
    table, gap, tail = rest.partition("\n\n")
    rows = re.split(r"\n(?= \S)", table)
    more = f"\n … {len(rows) - n_rows} more rows" if len(rows) > n_rows else ""
    return head + rule + "\n".join(rows[:n_rows]) + more + gap + tail


def commands(command: click.Command = cli, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command and subcommand, in the order of `place --help`."""
    yield words
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from commands(below, (*words, name))


def help_texts() -> str:
    """A heading and the `--help` of every command."""
    return "\n\n".join(
        f"### {' '.join(('place', *words))}\n```text\n{shown((*words, '--help'))}\n```"
        for words in commands()
    )


def coefficient_table() -> str:
    """Every coefficient of the speed model: default, the reference machine's own value, unit and meaning."""
    fitted = resolve_machine(REFERENCE_MACHINE).coefficients
    rows = [f"| coefficient | default | `{REFERENCE_MACHINE}` | unit | meaning |", "|---|---|---|---|---|"]
    for name, each in DEFAULTS.items():
        own = f"{fitted[name].value:g} ({fitted[name].source})" if name in fitted else ""
        rows.append(f"| `{name}` | {each.value:g} | {own} | {each.unit} | {each.meaning} |")
    return "\n".join(rows)
