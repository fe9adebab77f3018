"""`syncline why`: explain a version of a run, from the log of commits.

The log holds a record of every commit, with the plan of its merge. It is read with the coordinator's key, during the
run and after.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from syncline_cli.options import HELP_NAMES, FindConnect, Json, Key, RunName, TlsCa, TlsCert, TlsKey, new_app

if TYPE_CHECKING:
    from syncline.wire.messages import Committed, Head, PlanEntry

app = new_app()

Line = tuple[str, str]  # a text and its style

MAX_ROWS = 20  # updates that are shown without --all


@app.command(
    context_settings=HELP_NAMES,
    short_help="Explain a version: merged, late and dropped updates, with reasons.",
    epilog="Example: syncline why digits-3f2a1b 12",
)
def why(
    run: RunName,
    version: Annotated[int | None, typer.Argument(metavar="VERSION", help="Default: the newest.")] = None,
    agent: Annotated[
        str, typer.Option(metavar="NAME", help="Show the coordinator's recent decisions about this agent instead.")
    ] = "",
    connect: FindConnect = "",
    key: Key = "",
    tls_ca: TlsCa = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    every: Annotated[bool, typer.Option("--all", help=f"Show all updates, not only {MAX_ROWS}.")] = False,
    as_json: Json = False,
) -> None:
    """Explain a version: why its round closed, the merged updates with weights and lags, late agents, dropped updates.

    With --agent, list the recent facts about an agent and the coordinator's decisions that followed, while the run goes on.
    """
    from rich.console import Console
    from rich.text import Text

    from syncline.bus.tls import Tls
    from syncline.client.history import commit_of
    from syncline.client.runs import head_of
    from syncline.client.story import story
    from syncline.errors import ConfigError
    from syncline_cli.connect import ask, choose_broker
    from syncline_cli.ui.display import clean
    from syncline_cli.ui.results import print_json

    async def read(bus: Any) -> tuple[Head, Committed]:
        head = await head_of(bus, run)
        return head, await commit_of(bus, head, head.version if version is None else version)

    async def read_story(bus: Any) -> list[str]:
        return await story(bus, run, agent)

    broker = choose_broker(connect, key, tls=Tls(tls_ca, tls_cert, tls_key))
    console = Console(highlight=False)
    if agent:
        if version is not None:
            raise ConfigError("--agent", "the story of an agent is not about one version", "Leave VERSION out")
        lines = ask(broker, read_story)
        if as_json:
            print_json({"run": run, "agent": agent, "story": lines})
            return
        for line in lines:
            console.print(Text(clean(line)), soft_wrap=True)
        return
    head, commit = ask(broker, read)
    if as_json:
        print_json(as_object(commit))
        return
    for line, style in as_lines(commit, head, None if every else MAX_ROWS):
        console.print(Text(line, style), soft_wrap=True)


def as_object(commit: Committed) -> dict[str, Any]:
    """Return the commit with the keys that scripts rely on."""
    plan = commit.plan
    return {
        "run": commit.run,
        "version": commit.version,
        "closed_by": plan.reason,
        "merged": [_entry(e) for e in plan.merged],
        "dropped": [{"agent": d.agent, "clock": d.clock, "reason": d.reason} for d in commit.dropped],
        "dropped_more": commit.dropped_more,
        "late": list(plan.late),
        "bytes": commit.bytes_up + commit.bytes_down,
        "bytes_up": commit.bytes_up,
        "bytes_down": commit.bytes_down,
        "phases_s": commit.phases_s,
        "term": commit.term,
        "digest": commit.digest,
    }


def _entry(e: PlanEntry) -> dict[str, Any]:
    return {"agent": e.agent, "clock": e.clock, "lag": e.lag, "weight": e.weight, "seconds": e.seconds}


def as_lines(commit: Committed, head: Head, rows: int | None) -> Iterator[Line]:
    """Yield the lines for people, section by section.

    A further section, such as the history of one agent, is one more generator here.

    Args:
        rows: the most entries to list of each kind; None: all.
    """
    yield from _title(commit, head)
    yield from _merged(commit, rows)
    yield from _left_out(commit, rows)
    yield from _figures(commit)


def _title(commit: Committed, head: Head) -> Iterator[Line]:
    """Yield the version and the reason why its round closed."""
    from syncline_cli.ui.display import clean

    of = f" of {head.version:,} so far" if commit.version < head.version else ""
    yield f"run {commit.run}, version {commit.version:,}{of}", "bold"
    yield f"  closed by: {clean(commit.plan.reason)}", ""


def _merged(commit: Committed, rows: int | None) -> Iterator[Line]:
    """Yield the table of merged updates; those with the largest lag come first, and of these the slowest."""
    from syncline.observe.naming import natural_order

    merged = sorted(commit.plan.merged, key=lambda e: (-e.lag, -e.seconds, natural_order(e.agent)))
    table: list[tuple[str, ...]] = [("merged", "clock", "lag", "weight", "rows", "steps", "seconds")]
    for e in merged[:rows]:
        counts = (f"{e.samples:,}", f"{e.steps:,}", f"{e.seconds:.3f}")
        table.append((e.agent, f"{e.clock:,}", f"{e.lag}", f"{e.weight:.4g}", *counts))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for i, row in enumerate(table):
        cells = [row[0].ljust(widths[0]), *(f.rjust(w) for f, w in zip(row[1:], widths[1:], strict=True))]
        yield f"  {'  '.join(cells)}", "" if i else "dim"
    yield from _hidden(len(merged), rows)


def _left_out(commit: Committed, rows: int | None) -> Iterator[Line]:
    """Yield the late agents and the dropped updates, with reasons."""
    from syncline.observe.naming import natural_order
    from syncline_cli.ui.display import clean

    names = sorted(commit.plan.late, key=natural_order)
    late = [f"late: {name}; the round closed without its update" for name in names]
    dropped = [f"dropped: {d.agent}, clock {d.clock:,}: {clean(d.reason)}" for d in commit.dropped]
    if commit.dropped_more:
        dropped.append(f"dropped: {commit.dropped_more:,} more, which the record has no room for")
    for lines in (late, dropped):
        yield from ((f"  {line}", "yellow") for line in lines[:rows])
        yield from _hidden(len(lines), rows)


def _figures(commit: Committed) -> Iterator[Line]:
    """Yield the seconds of each phase, the traffic, and the identity of the version."""
    from syncline_cli.ui.display import megabytes

    phases = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in commit.phases_s.items())
    yield f"  {phases}; {megabytes(commit.bytes_up)} up, {megabytes(commit.bytes_down)} down", ""
    yield f"  digest {commit.digest}, term {commit.term}", "dim"


def _hidden(count: int, rows: int | None) -> Iterator[Line]:
    """Yield the number of entries beyond the first `rows`."""
    if rows is not None and count > rows:
        yield f"  … and {count - rows:,} more: --all shows them", "dim"
