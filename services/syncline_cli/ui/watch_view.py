"""The picture of a watched run, fitted to the terminal for any number of agents. Draws a FleetState.

Lines are laid out by hand, because only the agents that fit are drawn, in a few microseconds each.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime

from rich.text import Text

from syncline.observe.fleet_state import LATE_S, SILENT_S, FleetState, RunEvent
from syncline.observe.naming import natural_order
from syncline.observe.run_state import TRAINING_LOSS, AgentState, Curve, RunState
from syncline.wire.messages import ENDED
from syncline.wire.subjects import FLEET
from syncline_cli.ui.display import STYLES, clean, counted, megabytes, number

GAP = "  "
STATE_COLUMNS = 13  # of «training 100%»
WIDE = 110  # columns from which wide columns are shown
MAX_CURVES = 4
MAX_EVENTS = 8
MIN_EVENTS = 3
MIN_CURVE_COLUMNS = 8
PHASE_STYLES = {"done": "bold green", "failed": "bold red", "refused": "bold red"}
DEAF = "no agent is heard: the key watch.nk hears agents, the coordinator's key does not"
KEYS = "q or Ctrl-C to leave"


@dataclass(frozen=True, slots=True)
class AgentCondition:
    """The condition of an agent in one word, with its order: agents in trouble come first."""

    rank: int
    word: str
    style: str = ""

    @classmethod
    def of(cls, agent: AgentState, now_s: float, *, ended: bool = False) -> AgentCondition:
        """Return the condition of an agent; after the end of its run only failures and losses count."""
        if agent.failed:
            return cls(0, "cannot train", "red")
        if agent.lost:
            return cls(1, "lost", "red")
        if ended:
            return cls(5, "", "dim")
        if agent.slow:
            return cls(2, "slow", "yellow")
        if agent.train is None:
            return cls(5, "starting", "dim")
        if now_s - agent.seen_s > SILENT_S:
            return cls(3, "silent", "yellow")
        if now_s - agent.late_at_s < LATE_S:
            return cls(4, "late", "yellow")
        return cls(5, agent.train.state, "dim" if agent.train.state in ("waiting", "starting") else "")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table of agents."""

    title: str
    width: int
    cell: Callable[[RunState, AgentState, float], str]
    wide: bool = False  # only on a wide terminal


def _train(cell: Callable[[RunState, AgentState], str]) -> Callable[[RunState, AgentState, float], str]:
    """Return a cell that is empty for an agent without a training metric."""
    return lambda state, agent, now_s: "" if agent.train is None else cell(state, agent)


def _steps(state: RunState, agent: AgentState) -> str:
    done, steps = state.steps_of(agent)
    return f"{done:,}/{steps:,}" if steps else ""


def _lag(state: RunState, agent: AgentState, _now_s: float) -> str:
    lag = state.lag(agent)
    return "" if lag is None or agent.lost or agent.failed else str(lag)


COLUMNS = (
    Column("clock", 6, _train(lambda s, a: f"{a.train.clock}" if a.train else "")),
    Column("lag", 4, _lag),
    Column("late", 5, lambda s, a, now_s: str(a.late_rounds or ""), wide=True),
    Column("steps", 13, _train(_steps), wide=True),
    Column(
        "loss", 8, _train(lambda s, a: number("loss", a.train.loss) if a.train and a.train.loss is not None else "")
    ),
    Column(
        "rows/s", 8, _train(lambda s, a: f"{a.train.samples_per_s:,.0f}" if a.train and a.train.samples_per_s else "")
    ),
    Column("rows", 9, _train(lambda s, a: f"{a.train.rows:,}" if a.train and a.train.rows else ""), wide=True),
    Column("up", 9, _train(lambda s, a: megabytes(a.train.bytes_up) if a.train else "")),
    Column("down", 9, _train(lambda s, a: megabytes(a.train.bytes_down) if a.train else ""), wide=True),
    Column("seen", 6, lambda s, a, now_s: ago(now_s - a.seen_s) if a.train else "—"),
)


def picture(fleet: FleetState, width: int, height: int, now_s: float, wall_s: float, url: str) -> Text:
    """Draw at most `height` lines of at most `width` columns.

    Args:
        now_s: the clock that `fleet.handle` was given.
        wall_s: seconds since the epoch.
        url: the broker's address, without passwords.
    """
    state = fleet.shown(now_s)
    if state is None:
        lines = list(_nothing(fleet, width, url))
    else:
        others = [run for run in fleet.active(now_s) if run != state.run]
        lines = [*_head(state, others, width, now_s, wall_s), *_curves(state, width), Text("")]
        room = height - len(lines) - 1
        events = _events(fleet, state.run, width, _events_that_fit(room, len(state.agents)))
        lines += _agents(state, width, room - len(events), now_s)
        lines += events
    lines = lines[: height - 1]
    lines += [Text("")] * (height - 1 - len(lines))
    going = "; the run continues" if state is not None and state.phase not in ENDED else ""
    return Text("\n").join(_fitted(line, width) for line in [*lines, Text(KEYS + going, "dim")])


def ago(seconds: float) -> str:
    """Return an age in at most six columns."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{min(999, int(seconds // size))} {unit}"
    return f"{int(seconds)} s" if seconds >= 3 else "now"


def clock(wall_s: float) -> str:
    """Return the local time of day."""
    return datetime.fromtimestamp(wall_s).strftime("%H:%M:%S")


# -- parts ------------------------------------------------------------------------------------------------------------


def _nothing(fleet: FleetState, width: int, url: str) -> Iterator[Text]:
    """Draw the picture before the run is heard."""
    wanted = f"run {fleet.selected}" if fleet.selected else "a run"
    yield Text.assemble((f"waiting for {wanted}", "bold"), (f"  {url}", "dim"))
    yield Text("")
    for line in waiting_for(fleet):
        yield Text(line)
    yield Text("")
    yield from _events(fleet, FLEET, width, MAX_EVENTS)


def waiting_for(fleet: FleetState) -> Iterator[str]:
    """Yield the known facts while the run is not heard, and a hint."""
    status = fleet.status
    if status is None:
        yield "no message from a coordinator so far"
    else:
        busy = f"run {status.run} is active" if status.run else "no run is active"
        queued = f", queued: {', '.join(status.queued)}" if status.queued else ""
        yield f"the coordinator is up with {counted(status.agents, 'agent')}; {busy}{queued}"
    if fleet.selected:
        if suggestion := fleet.suggestion():
            yield suggestion
        if status is None:
            yield "a run that has ended sends no messages: `syncline ls` lists it, `syncline why` explains it"
    elif status is not None and not status.run:
        yield "submit one: syncline run SPEC.yaml"


def _head(state: RunState, others: list[str], width: int, now_s: float, wall_s: float) -> Iterator[Text]:
    """Draw the run, its last round, and its progress."""
    status, round_ = state.status, state.round
    left = Text.assemble((f"run {state.run}", "bold"), GAP, (state.phase, PHASE_STYLES.get(state.phase, "green")))
    if status is not None and status.phase == "waiting" and not state.version:
        left.append(f"  {status.agents} of {counted(status.needed, 'agent')}", "yellow")
    left.append(f"{GAP}{_one_line(status.task)}" if status is not None else "", "dim")
    left.append(f"{GAP}also: {', '.join(others)}" if others else "", "dim")
    yield _pair(left, Text(clock(wall_s), "dim"), width)
    standings = Counter(AgentCondition.of(agent, now_s).word for agent in state.agents.values())
    bad = [
        f"{standings[word]} {word}" for word in ("cannot train", "lost", "slow", "silent", "late") if standings[word]
    ]
    parts = [counted(len(state.agents), "agent"), *bad]
    if state.phase in ENDED:
        parts = [_one_line(state.ended.removeprefix(f"run {state.run}: "))]
    elif round_ is not None:
        merge = f" (merge {round_.merge_s:.2f} s)" if width >= WIDE else ""
        parts.append(f"closed by {_one_line(round_.closed_by)} in {round_.seconds:.2f} s{merge}")
    elif status is not None and status.reason:
        parts.append(_one_line(status.reason))
    yield Text("  ".join(parts), "yellow" if bad and state.phase not in ENDED else "")
    yield _progress(state, width)
    if state.deaf:
        yield Text(DEAF, "yellow")


def _progress(state: RunState, width: int) -> Text:
    rate = sum(a.train.samples_per_s or 0 for a in state.agents.values() if a.train is not None and not a.lost)
    figures = f"version {state.version:,}" + (f" of {state.versions:,}" if state.versions else "")
    traffic = f"{megabytes(state.bytes_up)} up, {megabytes(state.bytes_down)} down" if state.round else ""
    right = Text(GAP.join(filter(None, [f"{rate:,.0f} rows/s" if rate else "", traffic])), "dim")
    room = width - len(figures) - len(right) - 2 * len(GAP)
    if room < MIN_CURVE_COLUMNS or not state.versions:
        return _pair(Text(figures), right, width)
    done = round(room * min(1.0, state.version / state.versions))
    return Text.assemble(figures, GAP, ("━" * done, "green"), ("━" * (room - done), "bright_black"), GAP, right)


def _curves(state: RunState, width: int) -> Iterator[Text]:
    names = [name for name in state.metric_names() if name in state.curves][: MAX_CURVES - 1]
    curves: list[tuple[str, float | None, Curve]] = [(n, state.metrics.get(n), state.curves[n]) for n in names]
    if TRAINING_LOSS in state.curves:
        trained = state.curves[TRAINING_LOSS]
        curves.append((TRAINING_LOSS, trained.points[-1][1], trained))
    figures = [number(name, value) for name, value, _ in curves]
    spans = [" … ".join(number(name, value) for value in curve.span) for name, _, curve in curves]
    wide, longest, widest = (max(map(len, column), default=0) for column in ([c[0] for c in curves], figures, spans))
    for (name, _, curve), figure, span in zip(curves, figures, spans, strict=True):
        line = Text.assemble((name.ljust(wide), "dim"), GAP, (figure.rjust(longest), "bold"), GAP)
        line.append(curve.sparkline(max(MIN_CURVE_COLUMNS, width - len(line) - len(GAP) - widest)), "green")
        yield line.append(f"{GAP}{span:>{widest}}", "dim")


def _agents(state: RunState, width: int, room: int, now_s: float) -> list[Text]:
    """Draw the heading and the rows that fit, agents in trouble first; count the rest."""
    if not state.agents or room < 2:
        return []
    ended = state.phase in ENDED
    standing = {name: AgentCondition.of(agent, now_s, ended=ended) for name, agent in state.agents.items()}
    names = sorted(state.agents, key=lambda name: (standing[name].rank, natural_order(name)))
    fits = room - 1
    shown = names if len(names) <= fits else names[: max(0, fits - 1)]
    columns = [column for column in COLUMNS if width >= WIDE or not column.wide]
    figures = sum(column.width + len(GAP) for column in columns)
    longest = max(map(len, shown), default=5)
    wide = max(5, min(longest, width - figures - STATE_COLUMNS - len(GAP)))
    heads = "".join(f"{GAP}{column.title:>{column.width}}" for column in columns)
    lines = [Text(f"{'agent':<{wide}}{GAP}{'state':<{STATE_COLUMNS}}{heads}", "dim")]
    for name in shown:
        agent, how = state.agents[name], standing[name]
        cells = "".join(f"{GAP}{column.cell(state, agent, now_s):>{column.width}}" for column in columns)
        word = _word(state, agent, how)
        reason = _one_line(agent.failed or agent.lost or agent.slow).removeprefix(f"{name} ")
        reason = reason.removeprefix("lost: ").removeprefix("slow: ")
        why = f"{GAP}{reason}" if how.rank < 3 and width >= WIDE else ""
        lines.append(
            Text.assemble(
                f"{_cut(name, wide):<{wide}}{GAP}", (f"{word:<{STATE_COLUMNS}}", how.style), cells, (why, "dim")
            )
        )
    if len(shown) < len(names):
        words = Counter(standing[name].word for name in names[len(shown) :])
        rest = ", ".join(f"{count} {word}" for word, count in words.most_common() if word)
        lines.append(Text(f"… and {len(names) - len(shown):,} more" + (f": {rest}" if rest else ""), "dim"))
    return lines


def _word(state: RunState, agent: AgentState, how: AgentCondition) -> str:
    """Return the agent's condition; while it trains, with the share of its period."""
    done, steps = state.steps_of(agent)
    return f"{how.word} {done / steps:.0%}" if how.word == "training" and steps else how.word


def _events_that_fit(room: int, agents: int) -> int:
    """Return the lines for events: agents come first, but a few events are always shown."""
    left = room - agents - 2
    return max(0, min(MAX_EVENTS, max(MIN_EVENTS, left), room - 3)) if room > 4 else 0


def _events(fleet: FleetState, run: str, width: int, lines: int) -> list[Text]:
    """Draw a blank line, the newest advice in at most half of the lines, and events, the newest last."""
    if lines < 2:
        return []
    state = fleet.runs.get(run)
    advice = state.advice if state is not None else None
    shown = [] if advice is None else _whole(RunEvent(run, advice), width, lines // 2)
    room = lines - 1 - len(shown)
    others = [s for s in fleet.recent if s.run in (run, FLEET) and s.event is not advice]
    shown += [_fitted(event_line(s), width) for s in others[max(0, len(others) - room) :]]
    return [Text(""), *shown] if shown else []


def _whole(said: RunEvent, width: int, lines: int) -> list[Text]:
    """Draw an event on several lines."""
    first = event_line(said)
    indent = len(clock(0)) + len(GAP)
    texts = textwrap.wrap(first.plain[indent:], max(10, width - indent), max_lines=lines, placeholder=" …")
    style = STYLES[said.event.level]
    top = Text.assemble(first[:indent], (texts[0], style))
    return [_fitted(line, width) for line in (top, *(Text(" " * indent + text, style) for text in texts[1:]))]


def event_line(said: RunEvent) -> Text:
    """Draw an event on one line, with its time."""
    event = said.event
    return Text.assemble((clock(event.time_s), "dim"), GAP, (_one_line(event.text), STYLES[event.level]))


def _one_line(text: str) -> str:
    return " ".join(clean(text).split())


def _pair(left: Text, right: Text, width: int) -> Text:
    """Draw one text at each end of a line; the left one is cut off if both do not fit."""
    room = width - len(right) - len(GAP)
    left.truncate(max(0, room), overflow="ellipsis", pad=True)
    return Text.assemble(left, GAP, right)


def _fitted(line: Text, width: int) -> Text:
    line.truncate(width, overflow="ellipsis")
    return line


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"
