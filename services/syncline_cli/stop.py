"""`syncline stop`: ends a run cleanly; its models and its log are kept."""

from __future__ import annotations

import asyncio
import getpass
import socket
from typing import TYPE_CHECKING, Annotated

import typer

from syncline_cli.options import HELP_NAMES, FindConnect, Json, Key, RunName, new_app

if TYPE_CHECKING:
    from syncline.bus.base import Bus
    from syncline.wire.messages import Head

app = new_app()

ENDS_S = 120.0  # how long it may take: the merge under way, and the evaluation of the last version
ANSWER_S = 10.0
LOOK_S = 0.1
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
    by: Annotated[str, typer.Option(metavar="WHO", help="For the run's reason; default: user@host.")] = "",
    as_json: Json = False,
) -> None:
    """End a run cleanly, with the merge that is under way, as "stopped by WHO".

    A run that is still queued never begins. Stopping a run that has ended changes nothing.
    """
    from syncline_cli.connect import ask, place
    from syncline_cli.results import print_json

    at = place(connect, key)
    outcome, head = ask(at, lambda bus: stop_run(bus, run, by or who(), at.url))
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


async def stop_run(bus: Bus, run: str, by: str, url: str) -> tuple[str, Head]:
    """How the request was answered, and the last head. Asks again while nothing comes of it."""
    from syncline.errors import ConfigError, NoResponders, RunFailed
    from syncline.wire import subjects
    from syncline.wire.messages import ENDED, Stop, Stopped, decode, encode
    from syncline_cli import runs

    await runs.head_of(bus, run)  # says what is near where there is no such run
    question, loop = encode(Stop(run=run, by=by)), asyncio.get_running_loop()
    deadline = loop.time() + ENDS_S
    outcome = ""
    while loop.time() < deadline:
        try:
            answer = decode(Stopped, await bus.request(subjects.stop(), question, ANSWER_S))
        except NoResponders:
            if not outcome:
                mend = f"Start one with `syncline coordinator --connect {url}`"
                raise ConfigError("--connect", f"no coordinator answers on {url}", mend) from None
        else:
            outcome = outcome or answer.outcome
        again_s = loop.time() + ASK_AGAIN_S
        while loop.time() < again_s:
            head = await runs.head_of(bus, run)
            if head.phase in ENDED:
                return outcome, head
            await asyncio.sleep(LOOK_S)
    raise RunFailed(f"run {run} was asked to stop and still goes on after {ENDS_S:g} s: see `syncline watch {run}`")
