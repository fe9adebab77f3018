"""Options that several commands share, with their environment variables and help texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from syncline.errors import ConfigError

HELP_NAMES: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
DEFAULT_URL = "nats://127.0.0.1:4222"


def _checked_address(ctx: typer.Context, param: typer.CallbackParam, text: str) -> str:
    """Refuse an invalid address at once. The error names the option or the variable that holds the address."""
    from syncline.bus.address import address_of

    source = ctx.get_parameter_source(str(param.name))
    if text:
        address_of(text, "SYNCLINE_NATS_URL" if source is not None and source.name == "ENVIRONMENT" else "--connect")
    return text


Connect = Annotated[
    str,
    typer.Option(
        envvar="SYNCLINE_NATS_URL",
        metavar="URL",
        callback=_checked_address,
        help="The broker, or its servers: a:4222,b:4222.",
    ),
]
FindConnect = Annotated[
    str,
    typer.Option(
        "--connect",
        envvar="SYNCLINE_NATS_URL",
        metavar="URL",
        callback=_checked_address,
        show_default=False,
        help=f"The broker; default: that of `demo` or `run --local` on this machine, else {DEFAULT_URL}.",
    ),
]
Key = Annotated[
    str, typer.Option(envvar="SYNCLINE_KEY", metavar="FILE", help="Key file; not needed for a broker without accounts.")
]
TlsCa = Annotated[
    str,
    typer.Option(envvar="SYNCLINE_TLS_CA", metavar="FILE", help="Certificate authorities to trust."),
]
TlsCert = Annotated[
    str,
    typer.Option(envvar="SYNCLINE_TLS_CERT", metavar="FILE", help="Client certificate, if the broker asks for one."),
]
TlsKey = Annotated[
    str,
    typer.Option(envvar="SYNCLINE_TLS_KEY", metavar="FILE", help="Private key of the client certificate."),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="The run's name, as `syncline ls` shows it.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line of standard output.")]
AllowTask = Annotated[
    list[str] | None,
    typer.Option(
        envvar="SYNCLINE_ALLOW_TASK", metavar="PATTERN", help="Allow more tasks, as 'my_task.py:*'; repeatable."
    ),
]


def _is_directory(text: str) -> str:
    """Return the path, or raise ConfigError if it is not a directory."""
    if not Path(text).is_dir():
        raise ConfigError(
            "--task-dir", f"{text!r} is not a directory", "Make it, or name the directory of the task files"
        )
    return text


TaskDir = Annotated[
    str,
    typer.Option(
        envvar="SYNCLINE_TASK_DIR", metavar="DIR", callback=_is_directory, help="Directory of the task files."
    ),
]
StateDir = Annotated[
    str,
    typer.Option(
        envvar="SYNCLINE_STATE_DIR",
        metavar="DIR",
        help="Agent state; default: ~/.local/state/syncline.",
    ),
]
Device = Annotated[str, typer.Option(envvar="SYNCLINE_DEVICE", metavar="DEVICE", help="auto, cpu, cuda:0 or mps.")]
Threads = Annotated[
    int, typer.Option(envvar="SYNCLINE_THREADS", metavar="N", min=0, help="Threads of torch; 0: torch decides.")
]
LogFile = Annotated[
    str | None,
    typer.Option(envvar="SYNCLINE_LOG_FILE", metavar="FILE", help="Log to this file; default: standard error."),
]
Patience = Annotated[
    float,
    typer.Option(envvar="SYNCLINE_PATIENCE", metavar="SECONDS", min=0, help="Time to try for the first connection."),
]


def new_app() -> typer.Typer:
    """Return the typer app of one command, with plain help pages."""
    return typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=HELP_NAMES)
