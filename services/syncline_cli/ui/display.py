"""The display of a followed run: a live picture on a terminal, plain lines elsewhere. Draws a RunState."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from syncline.observe.naming import natural_order
from syncline.observe.run_state import AgentState, RunState
from syncline_cli.process import since_start_s

FRAME_S = 0.125
LINE_S = 10.0  # longest time between plain lines while the run moves
MAX_WIDTH = 100  # columns
TENTHS = 10  # a plain line is printed after each tenth of the run
STYLES = {"info": "", "hint": "dim", "warning": "yellow", "error": "red"}


class View(Protocol):
    """One screen of the display."""

    def picture(self, width: int, height: int) -> RenderableType:
        """Return the picture for a terminal of that size."""
        ...

    def line(self) -> str:
        """Return the same as one line, which changes with the run and not with time alone; '' for no line."""
        ...

    def progress(self) -> float:
        """Return the share of the work that is done, 0 … 1."""
        ...


@dataclass(slots=True)
class Message:
    """A text, shown while no run is followed."""

    text: str

    def picture(self, width: int, height: int) -> RenderableType:
        return _titled(self.text, "", width)

    def line(self) -> str:
        return self.text

    def progress(self) -> float:
        return 0.0


@dataclass(slots=True)
class RunView:
    """The agents of a run and its shared model."""

    title: str
    state: RunState
    summary: str = ""  # replaces the lines of the shared model
    about: str = ""  # an explanation beside the title

    def picture(self, width: int, height: int) -> RenderableType:
        below = [Text(self.summary)] if self.summary else [_shared(self.state, width - 2)]
        room = max(1, height - 8 - len(self.state.metrics))
        parts: list[RenderableType] = [_titled(self.title, self.about, width)]
        if self.state.agents:
            parts.append(Padding(_agents(self.state, width - 2, room), (0, 0, 1, 2)))
        return Group(*parts, Padding(Group(*below), (0, 0, 0, 2)))

    def line(self) -> str:
        if self.summary:
            return f"{self.title}: {self.progress():.0%}"
        state = self.state
        if not state.version:
            return ""
        metrics = [f"{name} {number(name, state.metrics[name])}" for name in state.metric_names()[:3]]
        if metrics and state.evaluated < state.version:
            metrics.append(f"after {state.evaluated}")
        traffic = f"{megabytes(state.bytes_up)} up, {megabytes(state.bytes_down)} down"
        return "  ".join([f"round {state.version}/{state.versions}", *metrics, traffic])

    def progress(self) -> float:
        if not self.summary:
            return self.state.version / self.state.versions
        pairs = [self.state.steps_of(agent) for agent in self.state.agents.values()]
        return sum(done for done, _ in pairs) / max(1, sum(steps for _, steps in pairs))


def _titled(title: str, about: str, width: int) -> RenderableType:
    """Draw the title, an explanation, and the age of this process at the right end."""
    clock = f"{since_start_s():.1f} s"
    left = Text.assemble((title, "bold"), ("  " + about if about else "", "dim"))
    left.truncate(max(0, width - len(clock) - 2), overflow="ellipsis", pad=True)
    return Padding(Text.assemble(left, "  ", (clock, "dim")), (0, 0, 1, 0), expand=False)


def _agents(state: RunState, width: int, room: int) -> RenderableType:
    """Draw the first `room` agents, and the number of the others."""
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.width = width
    table.add_column(no_wrap=True, max_width=16, overflow="ellipsis")
    table.add_column(ratio=1)
    for _ in _FIGURES[: _figures_that_fit(width)]:
        table.add_column(no_wrap=True, justify="right")
    names = sorted(state.agents, key=natural_order)
    for name in names[:room]:
        table.add_row(name, *_agent(state, state.agents[name], _figures_that_fit(width)))
    if len(names) > room:
        table.add_row("…", Text(f"and {len(names) - room} more agents", "dim"))
    return table


def _agent(state: RunState, agent: AgentState, figures: int) -> list[RenderableType]:
    """Draw the cells of one agent: a bar for its period and the first `figures` figures, or its trouble."""
    train, (done, steps) = agent.train, state.steps_of(agent)
    if agent.lost or agent.failed:
        return [Text("cannot train" if agent.failed else "lost", "yellow")]
    if agent.slow:
        return [Text("slow: no progress; rounds do not wait for it", "yellow")]
    if train is None or not steps:
        return [Text("starting", "dim")]
    bar = ProgressBar(total=steps, completed=done, complete_style="cyan", finished_style="cyan")
    shown = [
        Text(f"{done}/{steps}".rjust(2 * len(str(steps)) + 1)),
        _figure("loss ", number("loss", train.loss).rjust(6), "", train.loss is not None),
        _figure("", f"{train.samples_per_s or 0:,.0f}".rjust(6), " rows/s", bool(train.samples_per_s)),
        _figure("v", str(train.version).ljust(len(str(state.versions))), "", bool(train.version)),
    ]
    return [bar, *shown[:figures]]


def _figure(before: str, value: str, after: str, known: bool) -> Text:
    """Draw a value with its name or unit, dimmed; blanks of the same width if the value is not known."""
    whole = Text.assemble((before, "dim"), value, (after, "dim"))
    return whole if known else Text(" " * len(whole))


_FIGURES = ("steps", "loss", "rate", "version")


def _figures_that_fit(width: int) -> int:
    """Return how many of _FIGURES a table of that width shows."""
    return 4 if width >= 70 else 2 if width >= 44 else 1


def _shared(state: RunState, width: int) -> RenderableType:
    """Draw rounds, metrics and traffic of the shared model."""
    metrics = state.metric_names()[:4]
    rounds = f"{state.version:,} of {state.versions:,}"
    figures = [number(name, state.metrics[name]) for name in metrics]
    names = max(len(name) for name in ("accuracy", "traffic", *metrics))
    wide = max(8, width - names - max(len(f) for f in (rounds, *figures)) - 4)
    done = max(1, round(wide * min(1.0, state.version / state.versions)))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim", min_width=names)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, width=wide)
    bar = ProgressBar(total=state.versions, completed=state.version, complete_style="green", finished_style="green")
    table.add_row("rounds", rounds, bar)
    for name, figure in zip(metrics, figures, strict=True):
        spark = state.curves[name].sparkline(done) if name in state.curves else ""
        table.add_row(name, Text(figure, "bold" if name == "accuracy" else ""), Text(spark, "green"))
    traffic = f"{megabytes(state.bytes_up)} up, {megabytes(state.bytes_down)} down" if state.round else ""
    return Group(table, Text.assemble(("traffic".ljust(names + 2), "dim"), traffic))


# -- figures ----------------------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """Replace control characters: a text from the bus must not command the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def number(name: str, value: float | None) -> str:
    """Return a metric as text; accuracies have three decimals, a missing value is a dash."""
    if value is None:
        return "—"
    if name == "accuracy":
        return f"{value:.3f}"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 10 else f"{value:.4g}"


def megabytes(count: int) -> str:
    """Return a number of bytes as kB, MB or GB (powers of ten)."""
    if 0 < count < 1e5:
        return f"{count / 1e3:,.1f} kB"
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def counted(count: int, noun: str) -> str:
    """Return `1 agent`, `2 agents`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


# -- the screen -------------------------------------------------------------------------------------------------------


@dataclass
class Screen:
    """Shows one view after the other. As an async context manager the screen redraws itself; as a plain one, by `frame`."""

    console: Console
    view: View = field(default_factory=lambda: Message(""))
    _live: Live | None = None
    _drawing: asyncio.Task[None] | None = None
    _printed: tuple[int, float] = (-1, 0.0)  # tenths and seconds of the last plain line
    _line: str = ""

    def __enter__(self) -> Screen:
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finish_view()
        if self._live is not None:
            self._live.update("")
            self._live.stop()

    async def __aenter__(self) -> Screen:
        self.__enter__()
        self._drawing = asyncio.create_task(self._draw())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._drawing is not None:
            self._drawing.cancel()
            await asyncio.gather(self._drawing, return_exceptions=True)
        self.__exit__()

    def show(self, view: View) -> None:
        """Finish the current view and show another."""
        self._finish_view()
        self.view, self._printed = view, (-1, 0.0)

    def say(self, level: str, text: str) -> None:
        """Print a line above the picture, without control characters."""
        self.console.print(Text(clean(text), STYLES.get(level, "")), soft_wrap=True)

    def _finish_view(self) -> None:
        """Print the events and the last line of the current view."""
        self.drain()
        if self._live is None:
            self._plain()

    def drain(self) -> None:
        """Print new warnings and errors of the run that is shown."""
        if isinstance(self.view, RunView):
            for event in self.view.state.take_events():
                self.say(event.level, event.text)

    def frame(self) -> None:
        """Draw the current view."""
        self.drain()
        if self._live is not None:
            width = min(self.console.width, MAX_WIDTH)
            picture = self.view.picture(width, self.console.height)
            self._live.update(Padding(picture, (1, 0, 0, 0)), refresh=True)
        else:
            self._plain()

    async def _draw(self) -> None:
        while True:
            self.frame()
            await asyncio.sleep(FRAME_S)

    def _plain(self) -> None:
        """Print a line when another tenth is done, and after LINE_S if the line has changed."""
        now, tenths, line = since_start_s(), int(self.view.progress() * TENTHS), self.view.line()
        due = tenths > self._printed[0] or (now - self._printed[1] > LINE_S and line != self._line)
        if line and due:
            self._printed, self._line = (tenths, now), line
            line += f"  {now:.1f} s" if isinstance(self.view, RunView) and not self.view.summary else ""
            self.console.print(line, soft_wrap=True, markup=False, highlight=False)
