"""The command `syncline`: the names of its commands and their exit codes. Each command is a module, imported when used.

Exit codes: 0 done, 1 the run failed, 2 wrong input or a missing extra, 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup
from typer.main import get_command

import syncline
from syncline_cli.options import HELP_NAMES
from syncline_cli.process import Interrupted

INTERRUPTED = 130

COMMANDS = {  # name → module with a typer `app`
    "demo": "syncline_cli.commands.demo",
    "run": "syncline_cli.commands.run",
    "sim": "syncline_cli.commands.sim",
    "coordinator": "syncline_cli.commands.coordinator",
    "agent": "syncline_cli.commands.agent",
    "watch": "syncline_cli.commands.watch",
    "why": "syncline_cli.commands.why",
    "ls": "syncline_cli.commands.ls",
    "stop": "syncline_cli.commands.stop",
    "export": "syncline_cli.commands.export",
    "keys": "syncline_cli.commands.keys",
    "doctor": "syncline_cli.commands.doctor",
    "bench": "syncline_cli.commands.bench",
}


class _Commands(TyperGroup):
    """Imports the module of a command when the command is used, so that each command starts quickly."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = cast(Any, dict.fromkeys(COMMANDS))  # the names, for suggestions

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name]).app
        command.rich_markup_mode = None  # one plain style of help for all
        return get_command(command)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=HELP_NAMES,
    epilog="First try: syncline demo",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"syncline {syncline.__version__}")
        raise typer.Exit


@app.callback()
def _syncline(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train one PyTorch model on many machines that communicate only over a NATS message bus."""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code. Errors go to standard error, without a traceback."""
    from syncline.errors import SynclineError

    try:
        app(argv, prog_name="syncline")
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # typer has caught Ctrl-C, and prints nothing
            print("interrupted", file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except SynclineError as error:
        from syncline.runtime.service import complain

        return complain(error)
    except (Interrupted, KeyboardInterrupt) as interrupted:
        print(f"interrupted{interrupted}", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
