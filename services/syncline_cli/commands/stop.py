"""`syncline stop`: ends a run cleanly; its models and its log are kept."""

from __future__ import annotations

import asyncio
import getpass
import socket
from typing import TYPE_CHECKING, Annotated

import typer

from syncline_cli.options import HELP_NAMES, FindConnect, Json, Key, RunName, TlsCa, TlsCert, TlsKey, new_app

if TYPE_CHECKING:
    from syncline.bus.base import Bus
    from syncline.wire.messages import Head
    from syncline_cli.connect import Place

app = new_app()

ENDS_S = 120.0  # how long it may take: the merge under way, and the evaluation of the last version
ANSWER_S = 10.0
ASK_AGAIN_S = 5.0  # a coordinator that was restarted meanwhile does not know that it was asked


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
    by: Annotated[str, typer.Option(metavar="WHO", help="For the run's reason; default: user@host.")] = "",
    as_json: Json = False,
) -> None:
    """End a run cleanly, with the merge that is under way, as "stopped by WHO".

    A run that is still queued never begins. Stopping a run that has ended changes nothing.
    """
    from syncline.bus.tls import Tls
    from syncline_cli.connect import ask, place
    from syncline_cli.ui.results import print_json

    at = place(connect, key, tls=Tls(tls_ca, tls_cert, tls_key))
    outcome, head = ask(at, lambda bus: stop_run(bus, run, by or who(), at))
    if as_json:
        print_json({"run": run, "outcome": outcome, "version": head.version, "reason": head.reason})
    elif outcome == "ended":
        print(f"run {run} had ended already, at version {head.version}: {head.reason}")
    elif not head.version:
        print(f"run {run} was {head.reason} before its first version")
    else:
        print(f"run {run} was {head.reason} at version {head.version}")
    if head.version and not at.found and not as_json:
        print(f"take its model home with: syncline export {run} {run}.safetensors")


def who() -> str:
    """`user@host`, as far as the system tells."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):
        user = "somebody"
    return f"{user}@{socket.gethostname()}"[:200]


async def stop_run(bus: Bus, run: str, by: str, at: Place) -> tuple[str, Head]:
    """How the request was answered first, and the last head. Asks again while nothing comes of it."""
    from syncline.client import runs
    from syncline.errors import RunFailed
    from syncline_cli.ui.follow import Follower

    await runs.head_of(bus, run)  # says what is near where there is no such run
    loop, outcome = asyncio.get_running_loop(), ""
    deadline = loop.time() + ENDS_S
    ended = asyncio.create_task(Follower(bus, run).until_ended())  # told of it: a local fleet is gone a moment later
    try:
        while loop.time() < deadline:
            outcome = await _ask(bus, run, by, at, outcome)
            done, _ = await asyncio.wait({ended}, timeout=ASK_AGAIN_S)
            if done:
                return outcome, ended.result()
    finally:
        ended.cancel()
        await asyncio.gather(ended, return_exceptions=True)
    raise RunFailed(f"run {run} was asked to stop and still goes on after {ENDS_S:g} s: see `syncline watch {run}`")


async def _ask(bus: Bus, run: str, by: str, at: Place, before: str) -> str:
    """The first answer that the coordinator gave. Raises ConfigError where there was none and is no coordinator."""
    from syncline.errors import BusError, ConfigError, Denied, NoResponders
    from syncline.wire import subjects
    from syncline.wire.messages import Stop, Stopped, decode, encode
    from syncline_cli.connect import come_back

    try:
        answer = decode(Stopped, await bus.request(subjects.stop(), encode(Stop(run=run, by=by)), ANSWER_S))
    except Denied:
        raise
    except NoResponders:
        if before:
            return before
        hint = f"Start one with `{come_back('syncline coordinator', at.url, at.key, at.tls)}`"
        raise ConfigError("--connect", f"no coordinator answers on {at.shown}", hint) from None
    except BusError:  # asked again soon
        return before
    return before or answer.outcome
