"""`syncline watch`: a run as it goes on, from the public feeds alone."""

from __future__ import annotations

from typing import Annotated

import typer

from syncline_cli.options import HELP_NAMES, FindConnect, Key, TlsCa, TlsCert, TlsKey, new_app

app = new_app()


@app.command(
    context_settings=HELP_NAMES,
    short_help="See a run as it goes on, from any machine.",
    epilog="Example: syncline watch digits-3f2a1b --connect nats://hub:4222 --key watch.nk",
)
def watch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Default: whichever speaks, one after the other.")] = "",
    connect: FindConnect = "",
    key: Key = "",
    tls_ca: TlsCa = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    plain: Annotated[bool, typer.Option("--plain", help="Lines even on a terminal, as they come elsewhere.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Every metric and event as a JSON object, one a line.")
    ] = False,
) -> None:
    """See a run as it goes on: version, curves, every agent with its lag, who is late or lost, and events.

    Reads the public feeds and says nothing itself: the key `watch.nk` is enough. Ends with RUN, at once where it has
    ended; without RUN it waits for the next.
    """
    from syncline.bus.tls import Tls
    from syncline_cli.ui.watching import Watching, watch_run

    tls = Tls(tls_ca, tls_cert, tls_key)
    raise typer.Exit(watch_run(Watching.of(run, connect, key, plain=plain, as_json=as_json, tls=tls)))
