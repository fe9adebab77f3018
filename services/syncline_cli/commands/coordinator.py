"""`syncline coordinator`: run the coordinator service in the foreground.

The service itself is `syncline_coordinator`; this module turns options into its settings. One coordinator serves a
broker: a second one is refused. The exit code is 0 after SIGINT or SIGTERM, and 2 for a wrong option or key.
"""

from __future__ import annotations

from typing import Annotated

import typer

from syncline_cli.options import (
    DEFAULT_URL,
    HELP_NAMES,
    AllowTask,
    Connect,
    Key,
    LogFile,
    Patience,
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
    short_help="Merge the agents' models; one per broker.",
    epilog="Example: syncline coordinator --connect nats://hub:4222 --key coordinator.nk",
)
def coordinator(
    connect: Connect = DEFAULT_URL,
    key: Key = "",
    tls_ca: TlsCa = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    threads: Threads = 0,
    allow_task: AllowTask = None,
    task_dir: TaskDir = ".",
    broker_log: Annotated[
        str,
        typer.Option(
            envvar="SYNCLINE_BROKER_LOG", metavar="FILE", help="The broker's log; its refusals become events."
        ),
    ] = "",
    keys: Annotated[
        str,
        typer.Option(envvar="SYNCLINE_KEYS", metavar="DIR", help="The fleet's keys, to name agents in those events."),
    ] = "",
    log_file: LogFile = None,
    patience: Patience = 60.0,
) -> None:
    """Accept runs and drive them, one after the other: merge the agents' models. Serves until SIGINT or SIGTERM."""
    from syncline.tasks import DEFAULT_ALLOWED
    from syncline_coordinator.app import run
    from syncline_coordinator.options import CoordinatorOptions

    options = CoordinatorOptions(
        connect=connect,
        key=key,
        tls_ca=tls_ca,
        tls_cert=tls_cert,
        tls_key=tls_key,
        threads=threads,
        allow_task=(*DEFAULT_ALLOWED, *(allow_task or ())),
        task_dir=task_dir,
        broker_log=broker_log,
        keys=keys,
        patience_s=patience,
        log_file=log_file,
    )
    raise typer.Exit(run(options))
