"""The demo: two runs on a local fleet, their display, and the comparison of their results."""

from __future__ import annotations

import importlib.util
import secrets
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from syncline.bus.base import Bus
from syncline.client.follow import RunFollower
from syncline.client.submit import submit
from syncline.observe.fleet_state import FleetState
from syncline.observe.naming import natural_order
from syncline.observe.run_state import AgentState, RunState
from syncline.spec.run_spec import RunSpec
from syncline.wire.subjects import COORDINATOR
from syncline_cli.local_fleet.demo_settings import TASK, DemoSettings
from syncline_cli.local_fleet.fleet import LocalFleet
from syncline_cli.local_fleet.supervise import FleetSupervisor
from syncline_cli.process import as_typed, since_start_s
from syncline_cli.ui.display import Message, RunView, Screen, counted, megabytes, number
from syncline_cli.ui.results import print_json, result_of

BAR_COLUMNS = 30  # of the longest bar in the final table
STALLED_S = 60.0  # without progress, after which the demo fails


class Demo:
    """The demo on one fleet. Call `run`, then `report`."""

    def __init__(self, settings: DemoSettings) -> None:
        self.settings = settings
        self.console = Console(stderr=settings.as_json, highlight=False)
        agents = counted(settings.agents, "agent")
        self.about = f"handwritten digits, {agents}, Dirichlet(0.5), α {settings.alpha:g}"
        self.screen = Screen(self.console, Message(f"starting a broker, a coordinator and {agents}"))
        self.result: dict[str, Any] = {}
        self.alone: dict[str, AgentState] = {}
        self.shared = RunState("", 1)

    async def run(self, fleet: LocalFleet) -> int:
        """Follow both runs to their end. Raises RunFailed."""
        bus, watch = await fleet.connect(COORDINATOR), await fleet.connect("watch")
        try:
            self._say_how_to_watch(fleet)
            # Without restarts of the coordinator: its end in a demo is a fault that the user should see.
            supervisor = FleetSupervisor(fleet, self.screen.say, coordinator_starts=0)
            name = f"demo-{secrets.token_hex(3)}"
            await self._together(supervisor, bus, watch, self.settings.spec(name))
            able = len(supervisor.able_agents(self.shared))
            await self._alone(supervisor, bus, watch, self.settings.spec_alone(f"{name}-alone", max(1, able)))
            self.screen.show(Message("stopping"))
        finally:
            await watch.close()
            await bus.close()
        return 0

    # -- the runs ----------------------------------------------------------------------------------------------------
    async def _together(self, supervisor: FleetSupervisor, bus: Bus, watch: Bus, spec: RunSpec) -> None:
        fleet_state = FleetState.of(spec)
        self.shared = fleet_state.followed
        for warning in spec.warnings:
            self.screen.say("warning", warning)
        self.screen.show(RunView("training together", self.shared, about=self.about))
        follower = await self._follow(supervisor, bus, watch, spec, fleet_state)
        first_s = 0.0 if follower.first_commit_at_s is None else since_start_s(follower.first_commit_at_s)
        self.result = {**result_of(follower), "first_commit_s": round(first_s, 3)}

    async def _alone(self, supervisor: FleetSupervisor, bus: Bus, watch: Bus, spec: RunSpec) -> None:
        steps = spec.local.steps_for(0)
        fleet_state = FleetState.of(spec)
        state = fleet_state.followed
        accuracy = number("accuracy", self.result["accuracy"])
        done = f"shared model: accuracy {accuracy} after {counted(self.shared.version, 'round')}"
        self.screen.show(RunView("each agent alone", state, done, f"on its own part, for as many steps: {steps:,}"))
        await self._follow(supervisor, bus, watch, spec, fleet_state)
        self.alone = {name: state.agents[name] for name in sorted(state.agents, key=natural_order)}

    async def _follow(
        self, supervisor: FleetSupervisor, bus: Bus, watch: Bus, spec: RunSpec, fleet_state: FleetState
    ) -> RunFollower:
        follower = RunFollower(bus, watch, fleet_state)
        await follower.open()
        await supervisor.while_up(submit(bus, spec, say=self.screen.say))
        await supervisor.until_ended(follower, spec.agents.min, stalled_s=STALLED_S)
        await follower.last_metrics(spec)
        return follower

    def _say_how_to_watch(self, fleet: LocalFleet) -> None:
        broker = fleet.broker
        key = broker.keyring.path("watch")
        self.screen.say("hint", f"watch from a second terminal: {fleet.watch_command}")
        self.screen.say("hint", "or with any NATS client:")
        self.screen.say("hint", f"  nats --server {broker.url} --nkey {key} sub 'syncline.v1.*.metrics.>'")

    # -- the results ---------------------------------------------------------------------------------------------------
    def report(self) -> int:
        """Print the results and return the exit code."""
        self.result["alone"] = {name: agent.metrics.get("accuracy") for name, agent in self.alone.items()}
        if self.settings.as_json:
            print_json({key: self.result[key] for key in _KEYS})
            return 0
        whole = Group(self._table(), "", self._figures(), "", self._next())
        self.console.print(Padding(whole, (1, 0, 1, 2), expand=False))
        return 0

    def _table(self) -> Table:
        """Draw the accuracies, and bars for the shares of errors."""
        table = Table.grid(padding=(0, 3, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, justify="right")
        table.add_column(no_wrap=True, justify="right")
        table.add_column(no_wrap=True, justify="right")
        table.add_column(no_wrap=True)
        table.add_row("", *(Text(head, "dim") for head in ("rows", "accuracy", "errors")))
        every = [agent.metrics.get("accuracy") for agent in self.alone.values()]
        worst = max([1.0 - a for a in (*every, self.result["accuracy"]) if a is not None], default=1.0)
        rows = 0  # of all parts
        for (name, agent), accuracy in zip(self.alone.items(), every, strict=True):
            part = self._rows(name, agent)
            rows += part
            table.add_row(f"{name} alone", f"{part:,}", *_errors(accuracy, worst, "cyan"))
        table.add_row(Text("shared model", "bold"), f"{rows:,}", *_errors(self.result["accuracy"], worst, "green"))
        return table

    def _rows(self, name: str, agent: AgentState) -> int:
        """Return the rows of an agent's part, which is the same in both runs."""
        known = [a.train.rows for a in (agent, self.shared.agents.get(name)) if a is not None and a.train is not None]
        return max(known, default=0)

    def _figures(self) -> Text:
        r = self.result
        rounds = f"{counted(r['versions'], 'round')} in {r['seconds']:.1f} s"
        traffic = f"{megabytes(r['bytes_up'])} up, {megabytes(r['bytes_down'])} down"
        return Text(f"{rounds}, the first {r['first_commit_s']:.1f} s after the start; {traffic}")

    def _next(self) -> Group:
        digits = importlib.util.find_spec("syncline.tasks.digits")
        syncline = as_typed()
        lines = (
            f"{syncline} demo --alpha 0.5 --agents 8",
            f"echo 'task: {TASK}' > mine.yaml",
            f"{syncline} run mine.yaml --local 4",
        )
        own = f"a task of your own: start from {digits.origin}" if digits else ""
        return Group(Text("next:", "dim"), *(Text(f"  {line}") for line in lines), Text(own, "dim", overflow="fold"))


_KEYS = (
    *("run", "versions", "seconds", "first_commit_s", "accuracy", "metrics", "alone"),
    *("bytes_up", "bytes_down", "digest", "reason"),
)


def _errors(accuracy: float | None, worst: float, style: str) -> tuple[Text, Text, Text]:
    """Draw accuracy, share of errors, and a bar for the errors, relative to the `worst` share."""
    if accuracy is None:
        return Text("—"), Text("—"), Text("")
    errors = 1.0 - accuracy
    strong = "bold" if style == "green" else ""
    bar = "█" * max(1, round(BAR_COLUMNS * errors / worst)) if errors and worst else ""
    return Text(f"{accuracy:.3f}", strong), Text(f"{errors:.1%}", strong), Text(bar, style)
