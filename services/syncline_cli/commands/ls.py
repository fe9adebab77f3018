"""`syncline ls`: the runs on a broker, the newest first."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from syncline_cli.options import HELP_NAMES, FindConnect, Json, Key, TlsCa, TlsCert, TlsKey, new_app

if TYPE_CHECKING:
    from syncline.bus.base import Bus

app = new_app()

AT_ONCE = 16  # runs that are read at the same time
ANSWER_S = 5.0


@dataclass(frozen=True, slots=True)
class Row:
    """A run as it is listed."""

    run: str
    phase: str  # as in head; and `queued` where it has not begun
    version: int
    versions: int | None  # the commits after which it is done
    agents: int  # present or slow ones, in the newest round
    slow: int  # of these, that make no progress
    roster: int  # all that ever took part
    task: str
    reason: str  # what closed the last round, or ended the run
    revision: int  # of its spec: the order in which runs came

    @property
    def ended(self) -> bool:
        from syncline.wire.messages import ENDED

        return self.phase in ENDED


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
    """List the runs on a broker, the newest first: phase, version, agents, and what ended or last moved each."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from syncline.bus.tls import Tls
    from syncline_cli.connect import ask, come_back, place
    from syncline_cli.ui.display import clean
    from syncline_cli.ui.results import print_json

    at = place(connect, key, tls=Tls(tls_ca, tls_cert, tls_key))
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
        start = come_back("syncline coordinator", at.url, at.key, at.tls)
        text = f"?: no coordinator answers, so nothing moves there. Start one: {start}"
        console.print(Text(text, "yellow"), soft_wrap=True)


_STYLES = {"done": "green", "failed": "red", "refused": "red", "queued": "dim"}


async def look(bus: Bus) -> tuple[list[Row], bool | None]:
    """The runs; and whether a coordinator answers, None where none has to."""
    rows = await read(bus)
    return rows, None if all(row.ended for row in rows) else await _answers(bus)


async def _answers(bus: Bus) -> bool:
    from syncline.errors import BusError
    from syncline.wire import subjects

    try:
        await bus.request(subjects.submit(), b"", ANSWER_S)  # no run at all: refused, and that is an answer
    except BusError:
        return False
    return True


async def read(bus: Bus) -> list[Row]:
    """Every run with a head that can be read. Raises BusError."""
    from syncline.client import runs

    known = await runs.names(bus)
    found: list[Row | None] = []
    for i in range(0, len(known), AT_ONCE):
        found += await asyncio.gather(*(_row(bus, name) for name in known[i : i + AT_ONCE]))
    return sorted((row for row in found if row is not None), key=lambda row: -row.revision)


async def _row(bus: Bus, name: str) -> Row | None:
    from syncline.bus.blobs import BlobGone
    from syncline.client import runs
    from syncline.errors import ConfigError
    from syncline.wire import subjects
    from syncline.wire.messages import ENDED, Presence, Roster, decode

    entry = await bus.kv_get(subjects.RUNS_BUCKET, subjects.spec_key(name))
    spec = await runs.spec_of(bus, name)
    agents = slow = roster = 0
    try:
        head = await runs.head_of(bus, name)
        if head.roster is not None:
            data = await runs.record(bus, name, head.roster)
            members = decode(Roster, data)
            slow, roster = members.presence.count(Presence.SLOW), len(members.agents)
            agents = slow + members.presence.count(Presence.PRESENT)
    except BlobGone:
        pass  # head has just moved on
    except ConfigError:
        return None  # submitted just now, or a newer Syncline's
    queued = head.phase not in ENDED and head.manifest is None
    return Row(
        run=name,
        phase="queued" if queued else head.phase,
        version=head.version,
        versions=spec.stop.versions if spec is not None else None,
        agents=agents,
        slow=slow,
        roster=roster,
        task=spec.task if spec is not None else "",
        reason=head.reason,
        revision=entry.revision if entry is not None else 0,
    )
