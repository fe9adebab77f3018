"""`syncline stop`: end a run cleanly; its models and its log are kept.

The request is repeated until head names an end: a coordinator that restarts meanwhile does not remember it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from syncline_cli.options import HELP_NAMES, FindConnect, Json, Key, RunName, TlsCa, TlsCert, TlsKey, new_app

if TYPE_CHECKING:
    from syncline.bus.base import Bus
    from syncline.client.stop import StopResult
    from syncline_cli.connect import BrokerChoice

app = new_app()


@app.command(
    context_settings=HELP_NAMES,
    short_help="End a run; its models and its log are kept.",
    epilog="Example: syncline stop digits-3f2a1b",
)
def stop(
    run: RunName,
    connect: FindConnect = "",
    key: Key = "",
    tls_ca: TlsCa = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    by: Annotated[str, typer.Option(metavar="NAME", help="Your name, for the run's reason; default: user@host.")] = "",
    as_json: Json = False,
) -> None:
    """End a run as "stopped by NAME", after the merge that is under way.

    A queued run never starts. Stopping a run that has ended changes nothing.
    """
    from syncline.bus.tls import Tls
    from syncline_cli.connect import ask, choose_broker
    from syncline_cli.ui.results import print_json

    at = choose_broker(connect, key, tls=Tls(tls_ca, tls_cert, tls_key))
    result = ask(at, lambda bus: _stop(bus, run, by, at))
    outcome, head = result.outcome, result.head
    if as_json:
        print_json({"run": run, "outcome": outcome, "version": head.version, "reason": head.reason})
    elif outcome == "ended":
        print(f"run {run} had ended before, at version {head.version}: {head.reason}")
    elif not head.version:
        print(f"run {run} was {head.reason} before its first version")
    else:
        print(f"run {run} was {head.reason} at version {head.version}")
    if head.version and not at.found and not as_json:
        print(f"export its model with: syncline export {run} {run}.safetensors")


async def _stop(bus: Bus, run: str, by: str, at: BrokerChoice) -> StopResult:
    """Stop the run; without a coordinator, name the command that starts one."""
    from syncline.client.stop import stop as stop_run
    from syncline.errors import ConfigError, NoResponders
    from syncline_cli.connect import command_with_options

    try:
        return await stop_run(bus, run, by)
    except NoResponders:
        hint = f"Start one with `{command_with_options('syncline coordinator', at.url, at.key, at.tls)}`"
        raise ConfigError("--connect", f"no coordinator answers on {at.shown}", hint) from None
