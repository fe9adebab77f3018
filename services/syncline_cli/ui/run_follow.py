"""The run that `syncline run` follows: its display and its result."""

from __future__ import annotations

import asyncio
from typing import Any

from rich.console import Console
from rich.text import Text

from syncline.bus.base import Bus
from syncline.client.follow import RunFollower, first_of, report_standstill
from syncline.client.submit import submit
from syncline.errors import BusError, RunFailed
from syncline.observe.fleet_state import FleetState
from syncline.runtime.service import DONE, FAILED
from syncline.spec.run_spec import RunSpec
from syncline.wire.subjects import COORDINATOR
from syncline_cli.connect import BrokerChoice, connection_error, submit_remote
from syncline_cli.local_fleet.fleet import LocalFleet
from syncline_cli.local_fleet.supervise import FleetSupervisor
from syncline_cli.process import silence_logging
from syncline_cli.ui.display import Message, RunView, Screen, megabytes, number
from syncline_cli.ui.results import print_json, result_of


class RunWatch:
    """The screen, the state and the result of one run."""

    def __init__(self, spec: RunSpec, as_json: bool, text: str = "", key: str = "") -> None:
        self.spec, self.as_json, self.key = spec, as_json, key
        self.console = Console(stderr=as_json, highlight=False)
        self.fleet = FleetState.of(spec)
        self.state = self.fleet.followed
        self.screen = Screen(self.console, Message(text or f"submitting run {spec.name}"))
        self.asked = False  # a submission was sent
        self.submitted = False  # a submission was accepted
        self.stayed: int | None = None  # the exit code of a run whose fleet stays up
        self.result: dict[str, Any] = {}

    def follows(self, warnings: list[str]) -> None:
        """Show the accepted run, after its warnings."""
        self.submitted = True
        for warning in warnings:
            self.screen.say("warning", warning)
        self.screen.show(RunView(f"run {self.spec.name}", self.state, about=self.spec.task))

    def ended(self, follower: RunFollower) -> None:
        """Keep the result of a run that has ended, successfully or not."""
        self.result = result_of(follower)

    def report(self) -> None:
        """Print the result as JSON, once, if JSON is wanted and the run was followed to its end."""
        if self.result and self.as_json:
            print_json(self.result)
            self.result = {}

    def summary(self) -> int:
        """Print the result of a successful run for people; return the exit code."""
        if not self.as_json:
            r = self.result
            metrics = [f"{name} {number(name, r['metrics'].get(name))}" for name in self.state.metric_names()]
            traffic = f"{megabytes(r['bytes_up'])} up, {megabytes(r['bytes_down'])} down"
            parts = [
                f"run {r['run']}: {r['reason']}",
                *metrics,
                f"{r['seconds']:.1f} s",
                traffic,
                f"digest {r['digest']}",
            ]
            self.console.print(Text(", ".join(parts)), soft_wrap=True)
        return DONE


async def follow_local(watch: RunWatch, fleet: LocalFleet) -> int:
    """Submit and follow the run on a local fleet. Raises RunFailed."""
    return await _follow_local(watch, FleetSupervisor(fleet, watch.screen.say))


async def _follow_local(watch: RunWatch, supervisor: FleetSupervisor) -> int:
    fleet = supervisor.fleet
    bus, feed_bus = await fleet.connect(COORDINATOR), await fleet.connect("watch")
    try:
        follower = RunFollower(bus, feed_bus, watch.fleet)
        await follower.open()
        watch.follows((await supervisor.while_up(submit(bus, watch.spec, say=watch.screen.say))).warnings)
        watch.screen.say("hint", f"watch from a second terminal: {fleet.watch_command}")
        try:
            await supervisor.until_ended(follower, watch.spec.agents.min)
        finally:
            if follower.ended:
                await follower.last_metrics(watch.spec)
                watch.ended(follower)
    finally:
        await feed_bus.close()
        await bus.close()
    return DONE


async def follow_and_stay(watch: RunWatch, fleet: LocalFleet) -> int:
    """Submit and follow the run on a local fleet; keep the fleet up afterwards, until a signal comes."""
    code, supervisor = DONE, FleetSupervisor(fleet, watch.screen.say)
    goodbye = Message("Ctrl-C ends the fleet")
    try:
        await _follow_local(watch, supervisor)
        watch.screen.show(goodbye)  # prints the last line of the run before its summary
        watch.summary()
    except RunFailed as error:
        watch.screen.show(goodbye)
        watch.screen.say("error", f"error: {error}")
        code = FAILED
    watch.report()
    name = watch.spec.name
    others = f"syncline why {name}, syncline export {name} {name}.safetensors, syncline run SPEC.yaml"
    watch.screen.say("hint", f"the fleet stays up: {others}")
    watch.stayed = code
    try:
        await supervisor.keep_up()
    except RunFailed as error:
        watch.screen.say("error", f"error: {error}")
    await asyncio.Event().wait()
    return code


async def submit_alone(watch: RunWatch, at: BrokerChoice, seed: str) -> int:
    """Submit the run and print its name."""
    silence_logging()
    errors = Screen(Console(stderr=True, highlight=False), Message(""))
    bus = await _connect(at, seed)
    try:
        watch.asked = True
        warnings = (await submit_remote(bus, watch.spec, at, errors.say)).warnings
    finally:
        await bus.close()
    for warning in warnings:
        errors.say("warning", warning)
    if watch.as_json:
        print_json({"run": watch.spec.name, "warnings": warnings})
    else:
        print(watch.spec.name)
    return DONE


async def follow_remote(watch: RunWatch, at: BrokerChoice, seed: str, watch_seed: str) -> int:
    """Submit and follow the run on a given broker.

    Args:
        seed: of the coordinator's key.
        watch_seed: of the watchers' key, which hears the agents; the coordinator's does not.

    Raises:
        RunFailed: the run failed.
    """
    silence_logging()
    bus = await _connect(at, seed)
    feed_bus = bus
    try:
        if watch_seed != seed:
            feed_bus = await _connect(at, watch_seed)
        async with watch.screen:
            await _follow_remote(watch, bus, feed_bus, at)
    finally:
        await feed_bus.close()
        await bus.close()
    return DONE


async def _connect(at: BrokerChoice, seed: str) -> Bus:
    try:
        return await at.connect("cli", seed)
    except BusError as error:
        raise connection_error(error, at) from None


async def _follow_remote(watch: RunWatch, bus: Bus, feed_bus: Bus, at: BrokerChoice) -> None:
    follower = RunFollower(bus, feed_bus, watch.fleet, watch.screen.say)
    await follower.open()
    watch.asked = True
    watch.follows((await submit_remote(bus, watch.spec, at, watch.screen.say)).warnings)
    head = await first_of(follower.until_ended(), report_standstill(follower, watch.screen.say))
    await follower.last_metrics(watch.spec)
    watch.ended(follower)
    if head.phase != "done":
        raise RunFailed(f"run {head.run}: {head.reason}")
