"""`syncline doctor`: check this set-up; each line has a hint.

The checks are in `syncline_cli.doctor`: of this machine in `checks_here`, of the broker in `checks_broker`. Both groups
run concurrently. A check never raises: errors become findings. The exit code is 1 if a finding is broken.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from syncline.bus.address import masked
from syncline.errors import ConfigError
from syncline_cli.options import HELP_NAMES, Device, FindConnect, Json, StateDir, TlsCa, TlsCert, TlsKey, new_app

if TYPE_CHECKING:
    from syncline_cli.doctor.checks_broker import Target
    from syncline_cli.doctor.findings import Finding

app = new_app()

HERE = ("python", "torch", "disk")
ON_BROKER = ("rights", "jetstream", "payload", "space", "clock", "coordinator")  # after broker and key
CHECKS = (*HERE, "broker", "key", *ON_BROKER)


@app.command(
    context_settings=HELP_NAMES,
    epilog="Example: syncline doctor --connect nats://hub:4222 --key edge-7.nk. Exit code 1: something is broken.",
)
def doctor(
    connect: FindConnect = "",
    key: Annotated[
        str, typer.Option(envvar="SYNCLINE_KEY", metavar="PATH", help="Key file, or a directory of them.")
    ] = "",
    tls_ca: TlsCa = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    name: Annotated[
        str, typer.Option(envvar="SYNCLINE_NAME", metavar="NAME", help="The key's owner; default: the file's name.")
    ] = "",
    state_dir: StateDir = "",
    device: Device = "auto",
    store: Annotated[str, typer.Option(metavar="DIR", help="The broker's store, if it is on this machine.")] = "",
    monitor: Annotated[
        str,
        typer.Option(
            envvar="SYNCLINE_MONITOR_URL", metavar="URL", help="The broker's HTTP pages; default: its port 8222."
        ),
    ] = "",
    only: Annotated[list[str] | None, typer.Option(metavar="CHECK", help="Make only this check; repeatable.")] = None,
    as_json: Json = False,
) -> None:
    """Check this machine with its GPUs and disks, and the broker with the rights of a key; print a hint for each problem."""
    for wanted in only or ():
        if wanted not in CHECKS:
            close = difflib.get_close_matches(wanted, CHECKS, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Use {', '.join(CHECKS)}"
            raise ConfigError("--only", f"{wanted!r} is not a check", hint)

    from syncline.bus.tls import Tls
    from syncline.runtime.service import state_dir as default_state_dir
    from syncline_cli.connect import choose_broker
    from syncline_cli.doctor import findings
    from syncline_cli.doctor.checks_broker import Target
    from syncline_cli.process import run_interruptible

    _check_monitor(monitor)
    at = choose_broker(connect, key, tls=Tls(tls_ca, tls_cert, tls_key))
    target = Target(at.url, at.key, name, monitor, at.tls)
    directories = {"disk": default_state_dir(state_dir), **({"store": Path(store)} if store else {})}
    found: list[Finding] = []

    async def work() -> int:
        found.extend(await examine(target, device, directories, set(only or CHECKS)))
        return 0 if findings.sound(found) else 1

    code = run_interruptible(work)
    print(json.dumps(findings.as_json(found)) if as_json else "\n".join(findings.as_lines(found)))
    raise typer.Exit(code)


def _check_monitor(url: str) -> None:
    """Raise ConfigError for an invalid address of the broker's HTTP pages."""
    try:
        parts = urlsplit(url)
        if not url or (parts.scheme in ("http", "https") and parts.hostname and parts.port != 0):
            return
    except ValueError:  # an invalid port or IPv6 address
        pass
    raise ConfigError("--monitor", f"{masked(url)!r} is not the address of HTTP pages", "Write it as http://host:8222")


async def examine(target: Target, device: str, directories: dict[str, Path], wanted: set[str]) -> list[Finding]:
    """Make the wanted checks, those of this machine and of the broker concurrently; return findings in the order of CHECKS."""
    import asyncio

    from syncline_cli.doctor import checks_here
    from syncline_cli.process import silence_logging

    silence_logging()
    here: list[Awaitable[Finding]] = []
    if "python" in wanted:
        here.append(checks_here.python())
    if "torch" in wanted:
        here.append(checks_here.torch(device))
    if "disk" in wanted:
        here += [checks_here.disk(name, directory) for name, directory in directories.items()]
    local, bus = await asyncio.gather(asyncio.gather(*here), _examine_broker(target, wanted))
    return [*local, *bus]


async def _examine_broker(target: Target, wanted: set[str]) -> list[Finding]:
    from syncline_cli.doctor.checks_broker import Broker
    from syncline_cli.doctor.findings import skipped

    if not wanted - set(HERE):
        return []
    broker = Broker(target)
    steps: dict[str, Callable[[], Awaitable[Finding]]] = {
        "broker": broker.reachable,
        "key": broker.log_in,
        **{check: getattr(broker, check) for check in ON_BROKER},
    }
    if wanted <= {*HERE, "broker"}:
        del steps["key"]  # a broker answers without a key
    found: list[Finding] = []
    try:
        for check in [check for check in steps if check in wanted or check in ("broker", "key")]:
            finding = await _in_time(check, steps[check])
            if check in wanted or finding.verdict == "broken":
                found.append(finding)
            if check in ("broker", "key") and finding.verdict == "broken":  # the other checks need these two
                reported = [f.check for f in found]
                found += [
                    skipped(other, f"needs {check}") for other in steps if other in wanted and other not in reported
                ]
                break
    finally:
        await broker.close()
    return found


async def _in_time(check: str, step: Callable[[], Awaitable[Finding]]) -> Finding:
    """Make a check within 30 s; its error becomes a finding."""
    import asyncio

    from syncline.errors import SynclineError
    from syncline_cli.doctor.findings import broken

    limit_s = 30.0
    try:
        async with asyncio.timeout(limit_s):
            return await step()
    except TimeoutError:
        return broken(check, f"no answer within {limit_s:g} s", "Look into the broker's log")
    except SynclineError as error:
        return broken(check, str(error), "Look into the broker's log")
