"""`syncline ls`: list the runs on a broker, the newest first.

The list comes from the bucket of runs and the rosters, read with the coordinator's key, so that ended runs are listed
too. One request finds out whether a coordinator answers, unless every run has ended.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from syncline_cli.options import HELP_NAMES, FindConnect, Json, Key, TlsCa, TlsCert, TlsKey, new_app

if TYPE_CHECKING:
    from syncline.bus.base import Bus
    from syncline.client.runs import RunSummary

app = new_app()


@app.command(
    context_settings=HELP_NAMES,
    short_help="List the runs on a broker.",
    epilog="Example: syncline ls --connect nats://hub:4222 --key coordinator.nk",
)
def ls(
    connect: FindConnect = "",
    key: Key = "",
    tls_ca: TlsCa = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    as_json: Json = False,
) -> None:
    """List the runs on a broker, the newest first: phase, version, agents, and the reason of the last round or of the end."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from syncline.bus.tls import Tls
    from syncline_cli.connect import ask, choose_broker, command_with_options
    from syncline_cli.ui.display import clean
    from syncline_cli.ui.results import print_json

    at = choose_broker(connect, key, tls=Tls(tls_ca, tls_cert, tls_key))
    rows, driven = ask(at, look)
    if as_json:
        runs = [{k: v for k, v in asdict(row).items() if k != "revision"} for row in rows]
        print_json({"runs": runs, "coordinator": driven})
        return
    console = Console(highlight=False)
    if not rows:
        console.print(f"no runs on {at.shown}: submit one with `syncline run SPEC.yaml`", markup=False, soft_wrap=True)
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, justify in (("run", "left"), ("phase", "left"), ("version", "right"), ("agents", "right")):
        table.add_column(Text(name, "dim"), no_wrap=True, justify=justify)  # type: ignore[arg-type]
    table.add_column(Text("reason", "dim"), overflow="ellipsis", no_wrap=console.is_terminal)
    table.show_header = True
    for row in rows:
        versions = f"{row.version:,}" + (f"/{row.versions:,}" if row.versions else "")
        agents = f"{row.agents}/{row.roster}" if row.roster else "—"
        agents += f", {row.slow} slow" if row.slow and not row.ended else ""
        phase = row.phase if driven is not False or row.ended else f"{row.phase}?"
        table.add_row(row.run, Text(phase, _STYLES.get(row.phase, "")), versions, agents, Text(clean(row.reason)))
    console.print(table, soft_wrap=not console.is_terminal)
    if driven is False:
        start = command_with_options("syncline coordinator", at.url, at.key, at.tls)
        text = f"?: no coordinator answers, so the run does not move. Start one: {start}"
        console.print(Text(text, "yellow"), soft_wrap=True)


_STYLES = {"done": "green", "failed": "red", "refused": "red", "queued": "dim"}


async def look(bus: Bus) -> tuple[list[RunSummary], bool | None]:
    """Return the runs, and whether a coordinator answers; None if every run has ended."""
    from syncline.client.runs import coordinator_answers, summaries

    rows = await summaries(bus)
    return rows, None if all(row.ended for row in rows) else await coordinator_answers(bus)
