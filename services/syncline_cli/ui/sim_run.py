"""The display of a simulated run: the picture of a real run, and a table of the agents' work."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from syncline.errors import RunFailed
from syncline.observe.fleet_state import FleetState
from syncline.observe.telemetry import Train
from syncline.spec.run_spec import RunSpec
from syncline_cli.process import Interrupted
from syncline_cli.ui.display import FRAME_S, Message, RunView, Screen, counted, megabytes, number
from syncline_cli.ui.results import print_json
from syncline_sim.fleet import AgentResult, Fleet, FleetResult
from syncline_sim.settings import SimSettings

MAX_ROWS = 24  # of the table of agents; a longer table shows the first and the last


class SimRun:
    """One simulated run and its display. Call `run` once."""

    def __init__(self, spec: RunSpec, settings: SimSettings, task_dir: Path, as_json: bool) -> None:
        self.spec, self.as_json = spec, as_json
        self.fleet = Fleet(spec, settings, task_dir, self._follow)
        self.console = Console(stderr=as_json, highlight=False)
        self.observed = FleetState.of(spec)
        self.state = self.observed.followed
        self.screen = Screen(self.console, Message("making the model"))
        self.fleet.on_warning = lambda text: self.screen.say("warning", text)
        self._view = RunView(f"simulated run {spec.name}", self.state)
        self._drawn_s = 0.0
        self._began_s = time.monotonic()

    def run(self) -> int:
        """Simulate the run and print its result.

        Returns:
            The exit code.

        Raises:
            ConfigError: the settings are refused.
            RunFailed: the run failed; the result until then is printed.
            Interrupted: Ctrl-C; the result until then is printed.
        """
        try:
            with self.screen:
                self.screen.frame()
                self.screen.show(self._view)
                self.fleet.run()
        except (KeyboardInterrupt, RunFailed) as error:
            if self.fleet.statistics.head is not None:
                self._report(self.fleet.result())
            if isinstance(error, RunFailed):
                raise
            raise Interrupted from None
        result = self.fleet.result()
        self._report(result)
        if result.phase != "done":
            raise RunFailed(f"run {result.run}: {result.reason}")
        return 0

    # -- progress ----------------------------------------------------------------------------------------------
    def _follow(self, subject: str, data: bytes) -> None:
        """Take a metric or an event; redraw the picture at most every FRAME_S."""
        if self.console.is_terminal or not subject.endswith(f".{Train.kind}"):  # no line prints what agents are doing
            self.observed.handle(subject, data, self.fleet.now_s)
        if time.monotonic() - self._drawn_s > FRAME_S:
            self._view.about = f"{self.spec.task}, {_seconds(self.fleet.now_s)} of virtual time"
            self.screen.frame()
            self._drawn_s = time.monotonic()

    # -- the result -----------------------------------------------------------------------------------------------
    def _report(self, result: FleetResult) -> None:
        real_s = time.monotonic() - self._began_s
        if self.as_json:
            print_json(as_object(result, real_s))
            return
        metrics = [
            f"{name} {number(name, result.metrics[name])}"
            for name in self.state.metric_names()
            if name in result.metrics
        ]
        versions = counted(result.versions, "version")
        rate = result.updates / result.seconds if result.seconds else 0.0
        parts = (
            f"run {result.run}: {result.reason or result.phase}", *metrics, *([versions] if versions != result.reason else []),
            f"{counted(result.updates, 'update')}, {rate:.3g} per second", f"{_seconds(result.seconds)} of virtual time",
            f"{real_s:.1f} s of real time", f"digest {result.digest}",
        )  # fmt: skip
        whole = Group(_agents(result), "", *_curve(result))
        self.console.print(Padding(whole, (1, 0, 0, 0), expand=False))
        self.console.print(Text(", ".join(parts)), soft_wrap=True)


def as_object(result: FleetResult, real_s: float) -> dict[str, Any]:
    """Return the result with the keys that scripts rely on."""
    return {
        "run": result.run,
        "versions": result.versions,
        "updates": result.updates,
        "seconds": result.seconds,
        "opened_s": result.opened_s,
        "real_s": round(real_s, 3),
        "accuracy": result.metrics.get("accuracy"),
        "metrics": result.metrics,
        "digest": result.digest,
        "phase": result.phase,
        "reason": result.reason,
        "timeline": [dataclasses.asdict(point) for point in result.timeline],
        "commits": [dataclasses.asdict(commit) for commit in result.commits],
        "agents": [dataclasses.asdict(agent) for agent in result.agents],
        "warnings": [{"time_s": time_s, "text": text} for time_s, text in result.warnings],
    }


def _agents(result: FleetResult) -> Table:
    """Draw one row per agent."""
    table = Table.grid(padding=(0, 2, 0, 0))
    heads = ("", "s/step", "periods", "busy", "merged", "late", "dropped", "lag", "most", "up", "down")
    for i, _ in enumerate(heads):
        table.add_column(no_wrap=True, justify="right" if i else "left")
    table.add_row(*(Text(head, "dim") for head in heads))
    shown = list(result.agents)
    if len(shown) > MAX_ROWS:
        shown = [*shown[: MAX_ROWS // 2], *shown[-MAX_ROWS // 2 :]]
    for i, agent in enumerate(shown):
        if i == MAX_ROWS // 2 and len(result.agents) > MAX_ROWS:
            table.add_row("…", Text(f"{len(result.agents) - MAX_ROWS} more", "dim"))
        table.add_row(*_row(agent, result.seconds))
    return table


def _row(agent: AgentResult, seconds: float) -> tuple[str, ...]:
    return (
        agent.agent,
        f"{agent.step_s:.3g}",
        f"{agent.periods:,}",
        f"{min(1.0, agent.busy_s / seconds):.0%}" if seconds else "—",
        f"{agent.merged:,}",
        f"{agent.late:,}",
        f"{agent.dropped:,}",
        f"{agent.mean_lag:.1f}",
        str(agent.max_lag),
        megabytes(agent.bytes_up),
        megabytes(agent.bytes_down),
    )


def _curve(result: FleetResult, rows: int = 10) -> list[Any]:
    """Draw the center's metrics by time, in at most `rows` rows."""
    points = result.timeline
    if not points:
        return []
    chosen = sorted({round(i * (len(points) - 1) / max(1, rows - 1)) for i in range(rows)})
    names = sorted(points[-1].metrics, key=lambda name: (name != "accuracy", name != "loss", name))[:4]
    table = Table.grid(padding=(0, 3, 0, 0))
    for _ in range(2 + len(names)):
        table.add_column(no_wrap=True, justify="right")
    table.add_row(*(Text(head, "dim") for head in ("time", "version", *names)))
    for point in (points[i] for i in chosen):
        when = _seconds(point.time_s - result.opened_s)
        table.add_row(when, f"{point.version:,}", *(number(name, point.metrics.get(name)) for name in names))
    return [table, ""]


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
