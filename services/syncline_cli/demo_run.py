"""The demo once its settings are checked: two runs on a fleet of our own, what they look like, and what came of them."""

from __future__ import annotations

import importlib.util
import secrets
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from syncline.bus.base import Bus
from syncline.spec import RunSpec
from syncline.wire.messages import Head
from syncline.wire.subjects import COORDINATOR
from syncline_cli.demo import TASK, DemoSettings
from syncline_cli.display import Message, RunView, Screen, megabytes, natural, number
from syncline_cli.follow import Feed, Follower, submit
from syncline_cli.local import LocalFleet
from syncline_cli.results import print_json, result_of
from syncline_cli.state import AgentState, RunState
from syncline_cli.supervise import until_ended

BAR = 24  # columns of the longest bar in the final table


class Demo:
    """`run` on a fleet that is up; then `report`."""

    def __init__(self, settings: DemoSettings) -> None:
        self.settings = settings
        self.console = Console(stderr=settings.as_json, highlight=False)
        n = settings.agents
        about = f"handwritten digits, {n} agent{'s' if n > 1 else ''}, Dirichlet(0.5) parts, α {settings.alpha:g}"
        self.about = about
        self.screen = Screen(self.console, Message(f"starting a broker, a coordinator and {n} agents"))
        self.result: dict[str, Any] = {}
        self.alone: dict[str, AgentState] = {}
        self.shared = RunState("", 1)

    async def run(self, fleet: LocalFleet) -> int:
        """Both runs. Raises RunFailed."""
        bus, watch = await fleet.connect(COORDINATOR), await fleet.connect("watch")
        try:
            self._say_how_to_watch(fleet)
            name = f"demo-{secrets.token_hex(3)}"
            await self._together(fleet, bus, watch, self.settings.spec(name))
            able = [a for a in self.shared.agents.values() if not a.lost and not a.failed]
            await self._alone(fleet, bus, watch, self.settings.spec_alone(f"{name}-alone", len(able)))
            self.screen.show(Message("stopping"))
        finally:
            await watch.close()
            await bus.close()
        return 0

    async def _together(self, fleet: LocalFleet, bus: Bus, watch: Bus, spec: RunSpec) -> None:
        state = self.shared = RunState(spec.name, spec.stop.versions, spec.local.steps_for(0))
        self.screen.show(RunView("training together", state, about=self.about))
        head, follower = await self._follow(fleet, bus, watch, spec, state)
        self.result = {**result_of(head, follower, state), "first_commit_s": round(follower.first_commit_s or 0.0, 3)}

    async def _alone(self, fleet: LocalFleet, bus: Bus, watch: Bus, spec: RunSpec) -> None:
        steps = spec.local.steps_for(0)
        state = RunState(spec.name, 1, steps)
        done = f"shared model: accuracy {number('accuracy', self.result['accuracy'])} after {self.shared.version} rounds"
        self.screen.show(RunView("each agent alone", state, done, f"on its own part, for as many steps: {steps:,}"))
        await self._follow(fleet, bus, watch, spec, state)
        self.alone = {name: state.agents[name] for name in sorted(state.agents, key=natural)}

    async def _follow(
        self, fleet: LocalFleet, bus: Bus, watch: Bus, spec: RunSpec, state: RunState
    ) -> tuple[Head, Follower]:
        feed = Feed(watch, state)
        await feed.open()
        await submit(bus, spec)
        follower = Follower(bus, spec.name)
        head = await until_ended(fleet, follower, state, spec.agents.min, self.screen.say)
        await feed.last(
            head.version, evaluated=spec.evaluate.center, agents=spec.agents.min if spec.evaluate.agents else 0
        )
        return head, follower

    def _say_how_to_watch(self, fleet: LocalFleet) -> None:
        broker = fleet.broker
        if self.settings.directory is not None:
            (broker.directory / "broker.url").write_text(f"{broker.url}\n")
        key = broker.keyring.path("watch")
        self.screen.say("dim", "watch from a second terminal, with the nats command-line tool:")
        self.screen.say("dim", f"  nats --server {broker.url} --nkey {key} sub 'syncline.v1.*.metrics.>'")

    # -- what came of it -----------------------------------------------------------------------------------------------
    def report(self) -> int:
        self.result["alone"] = {name: agent.metrics.get("accuracy") for name, agent in self.alone.items()}
        if self.settings.as_json:
            print_json({key: self.result[key] for key in _KEYS})
            return 0
        self.console.print()
        self.console.print(self._table())
        self.console.print()
        for line in self._figures():
            self.console.print(Text("  " + line))
        self.console.print()
        self._next()
        return 0

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for justify in ("left", "right", "right", "left"):
            table.add_column(justify=justify, no_wrap=True)  # type: ignore[arg-type]
        table.add_row("", Text("rows", "dim"), Text("accuracy", "dim"))
        rows = 0
        for name, agent in self.alone.items():
            part = agent.train.rows if agent.train is not None else 0
            rows += part
            table.add_row(f"{name} alone", f"{part:,}", *_bar(agent.metrics.get("accuracy"), "cyan"))
        table.add_row(Text("shared model", "bold"), f"{rows:,}", *_bar(self.result["accuracy"], "green"))
        return table

    def _figures(self) -> list[str]:
        r = self.result
        traffic = f"{megabytes(r['bytes_up'])} up, {megabytes(r['bytes_down'])} down"
        rounds = f"{r['versions']} round{'s' if r['versions'] > 1 else ''}"
        return [
            f"{rounds} in {r['seconds']:.1f} s, {traffic}; the first one committed {r['first_commit_s']:.1f} s after the start",
        ]

    def _next(self) -> None:
        digits = importlib.util.find_spec("syncline.tasks.digits")
        table = Table.grid(padding=(0, 2))
        table.add_row(Text("next", "dim"))
        table.add_row("syncline demo --alpha 0.5 --agents 8", Text("elastic mixing, more agents", "dim"))
        table.add_row("syncline run SPEC.yaml --local 4", Text(f"your settings; one line will do: task: {TASK}", "dim"))
        self.console.print(table)
        self.console.print(Text(f"  a task of your own looks like {digits.origin if digits else ''}"), soft_wrap=True)


_KEYS = (
    *("run", "versions", "seconds", "first_commit_s", "accuracy", "metrics", "alone"),
    *("bytes_up", "bytes_down", "digest", "reason"),
)


def _bar(value: float | None, style: str) -> tuple[Text, Text]:
    figure = Text(number("accuracy", value), "bold" if style == "green" else "")
    return figure, Text("█" * round(BAR * (value or 0.0)), style)
