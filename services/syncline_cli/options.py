"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

HELP_NAMES: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
DEFAULT_URL = "nats://127.0.0.1:4222"

Connect = Annotated[str, typer.Option(envvar="SYNCLINE_NATS_URL", metavar="URL", help="The broker.")]
FindConnect = Annotated[
    str,
    typer.Option(
        "--connect",
        envvar="SYNCLINE_NATS_URL",
        metavar="URL",
        show_default=False,
        help=f"The broker; default: the demo's or `run --local`'s on this machine, else {DEFAULT_URL}.",
    ),
]
Key = Annotated[
    str, typer.Option(envvar="SYNCLINE_KEY", metavar="FILE", help="Key file; none: a broker without accounts.")
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Its name, as `syncline ls` shows it.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on the last line of standard output.")]
AllowTask = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Allow tasks beside syncline.tasks.*, as 'my.tasks:*'; repeatable."),
]
TaskDir = Annotated[str, typer.Option(metavar="DIR", help="Where task files are looked for.")]
Threads = Annotated[int, typer.Option(metavar="N", help="Threads of torch; 0: torch decides.")]
LogFile = Annotated[str | None, typer.Option(metavar="FILE", help="Log there instead of to standard error.")]
Patience = Annotated[float, typer.Option(metavar="SECONDS", help="How long to try for the first connection.")]


def new_app() -> typer.Typer:
    """A command of its own, with plain help."""
    return typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=HELP_NAMES)
