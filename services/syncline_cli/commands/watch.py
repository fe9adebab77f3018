"""`syncline watch`: show a run in progress, from the public feeds alone.

The command needs no more than the watchers' key, and publishes nothing. On a terminal it draws a live picture,
elsewhere it prints lines; `--json` prints the messages themselves. The exit code is 1 if RUN failed, 2 if RUN does not
exist.
"""

from __future__ import annotations

from typing import Annotated

import typer

from syncline_cli.options import HELP_NAMES, FindConnect, Key, TlsCa, TlsCert, TlsKey, new_app

app = new_app()


@app.command(
    context_settings=HELP_NAMES,
    short_help="Watch a run in progress, from any machine.",
    epilog="Example: syncline watch digits-3f2a1b --connect nats://hub:4222 --key watch.nk",
)
def watch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Default: the active runs, one after the other.")] = "",
    connect: FindConnect = "",
    key: Key = "",
    tls_ca: TlsCa = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    plain: Annotated[bool, typer.Option("--plain", help="Print lines on a terminal too.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every metric and event as a JSON object, one per line.")
    ] = False,
) -> None:
    """Watch a run: version, curves, events, and every agent with its lag and state.

    The command only reads the public feeds, so the key `watch.nk` is enough. It ends with RUN; without RUN it shows
    the next run.
    """
    from syncline.bus.tls import Tls
    from syncline_cli.ui.watching import WatchSession, watch_run

    tls = Tls(tls_ca, tls_cert, tls_key)
    raise typer.Exit(watch_run(WatchSession.of(run, connect, key, plain=plain, as_json=as_json, tls=tls)))
