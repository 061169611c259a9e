"""The `place` command. Only this package prints, exits or catches `PlacementError`; only it imports click.

Every command is a module with a click command named `command`, loaded when it is called.
"""

from __future__ import annotations

import gc
import importlib
import sys
from typing import Any

import click

from placement.errors import PlacementError
from placement.files import PLACE_VERSION

COMMANDS = {
    "solve": ("placement.cli.solve", "Find the fastest placement and emit its exact arguments."),
    "check": ("placement.cli.check", "Memory, splits, speed and advice for anyone's arguments."),
    "explain": ("placement.cli.explain", "Draw where every layer, its experts and its KV cache live."),
    "profiles": ("placement.cli.profiles", "Check every section of a models.conf."),
    "apply": ("placement.cli.apply", "Write the choice into a models.conf, with the reasons."),
    "export-as": ("placement.cli.export_as", "The choice as a command, preset, YAML, unit or JSON."),
    "verify": ("placement.cli.verify", "Run the best solutions beside llama.cpp's own --fit."),
    "calibrate": ("placement.cli.calibrate", "Refit the machine's coefficients from what was measured."),
    "tune": ("placement.cli.tune", "Solve, run, refit and solve again until nothing better is predicted."),
    "import": ("placement.cli.import_", "Describe a GGUF file: its header as models/NAME.toml."),
    "export": ("placement.cli.export", "Write a header-only GGUF that llama.cpp can plan."),
    "models": ("placement.cli.models", "List the model descriptions that have names."),
    "machine": ("placement.cli.machine", "Show, detect or probe a machine."),
    "engine": ("placement.cli.engine", "Show which llama.cpp is used, and what it can do."),
}


FEW_COLLECTIONS = 200_000  # new objects before a collection


class _Commands(click.Group):
    """Commands whose modules are imported when they are called: start-up stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order of `COMMANDS`."""
        return [name for name, (module, _) in COMMANDS.items() if _exists(module)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import a command's module when it is asked for."""
        if name not in COMMANDS or not _exists(COMMANDS[name][0]):
            return None
        command: click.Command = importlib.import_module(COMMANDS[name][0]).command
        command.name = name
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Say which command was probably meant."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as exc:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=2)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx) from exc

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


def _exists(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(PLACE_VERSION, prog_name="place")
def cli() -> None:
    """Place large language models on unequal GPUs and the CPU for llama.cpp.

    MODEL is a name (see `place models`), a models/*.toml description, or a .gguf file (any part of a split
    set). MACHINE is a name or a machine file; without one the GPUs are detected. Numbers are labelled:
    estimated (no engine), planned (your llama.cpp, no weights loaded) or measured (run).

    \b
    Example:
      place solve qwen3-coder-q5 --ctx 262144
    """


def main() -> None:
    """Run `place`; errors become one line on stderr and an exit code (0 good, 1 infeasible, 2 input, 3 engine)."""
    # Graphs are many small objects without circles: collections find nothing and take a tenth of a solve. The
    # process is this command's own; the library leaves the collector as it is.
    gc.set_threshold(FEW_COLLECTIONS)
    try:
        # without its standalone mode click returns the code of an Exit instead of raising it
        code = cli.main(prog_name="place", standalone_mode=False)
    except PlacementError as exc:
        click.echo(f"place: {exc}", err=True)
        sys.exit(exc.exit_code)
    except click.exceptions.NoArgsIsHelpError as exc:
        click.echo(exc.format_message(), err=True)
        sys.exit(2)
    except click.Abort:
        click.echo("place: stopped", err=True)
        sys.exit(130)
    except click.ClickException as exc:
        hint = ""
        if isinstance(exc, click.UsageError) and exc.ctx is not None:
            hint = f" (see {exc.ctx.command_path} --help)"
        click.echo(f"place: {exc.format_message()}{hint}", err=True)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    if isinstance(code, int):
        sys.exit(code)
