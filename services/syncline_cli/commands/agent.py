"""`syncline agent`: run the agent service in the foreground.

The service itself is `syncline_agent`; this module turns options into its settings. Options have environment variables,
so that a container or a unit file needs no command line. The exit code is 0 after a drain, and 2 for a wrong option or
key.
"""

from __future__ import annotations

import re
import socket
from typing import Annotated

import typer

from syncline_cli.options import (
    DEFAULT_URL,
    HELP_NAMES,
    AllowTask,
    Connect,
    Device,
    LogFile,
    Patience,
    StateDir,
    TaskDir,
    Threads,
    TlsCa,
    TlsCert,
    TlsKey,
    new_app,
)

app = new_app()


@app.command(
    context_settings=HELP_NAMES,
    short_help="Train on this machine, for the runs on a broker.",
    epilog="Example: syncline agent --connect nats://hub:4222 --name edge-7 --key edge-7.nk",
)
def agent(
    connect: Connect = DEFAULT_URL,
    name: Annotated[
        str,
        typer.Option(
            envvar="SYNCLINE_NAME",
            metavar="NAME",
            help="Default: the host's name; auto: that of a free key.",
        ),
    ] = "",
    key: Annotated[
        str,
        typer.Option(envvar="SYNCLINE_KEY", metavar="PATH", help="Key file, or a directory of NAME.nk."),
    ] = "",
    tls_ca: TlsCa = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    state_dir: StateDir = "",
    device: Device = "auto",
    threads: Threads = 0,
    allow_task: AllowTask = None,
    task_dir: TaskDir = ".",
    log_file: LogFile = None,
    patience: Patience = 60.0,
) -> None:
    """Train on this machine in assigned runs. Serves until SIGINT or SIGTERM, then drains."""
    from syncline.runtime.service import state_dir as default_state_dir
    from syncline.tasks import DEFAULT_ALLOWED
    from syncline_agent.app import run
    from syncline_agent.options import AgentOptions

    options = AgentOptions(
        name=name or name_of_host(socket.gethostname()),
        connect=connect,
        key=key,
        tls_ca=tls_ca,
        tls_cert=tls_cert,
        tls_key=tls_key,
        state_dir=str(default_state_dir(state_dir)),
        device=device,
        threads=threads,
        allow_task=(*DEFAULT_ALLOWED, *(allow_task or ())),
        task_dir=task_dir,
        patience_s=patience,
        log_file=log_file,
    )
    raise typer.Exit(run(options))


def name_of_host(host: str) -> str:
    """Return a valid agent name made from the host's name without its domain."""
    return re.sub(r"[^a-z0-9-]+", "-", host.partition(".")[0].lower()).strip("-")[:63] or "agent"
