"""`syncline bench`: measure this machine: rounds per second of the services without training.

A task without training and with a model of a chosen size runs on a local fleet. The times between the commits are those
of the services and the broker alone. Needs the extra `local`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from syncline.bus.base import Delivery
from syncline.client.submit import submit
from syncline.errors import RunFailed
from syncline.runtime.service import loop_factory
from syncline.spec.run_spec import RunSpec, parse
from syncline.wire import subjects
from syncline.wire.messages import Head, Notify, decode
from syncline_cli.local_fleet.fleet import FleetSettings, LocalFleet, agent_names
from syncline_cli.local_fleet.requirements import check_broker

app = typer.Typer(no_args_is_help=True, add_completion=False)

WARM_UP_ROUNDS = 20


@dataclass(slots=True)
class CommitTimes:
    """The times at which the versions of a run were seen committed."""

    times_s: list[float]
    ended: asyncio.Event
    phase: str = ""
    reason: str = ""

    async def on_notify(self, delivery: Delivery) -> None:
        now = time.perf_counter()
        head = decode(Head, decode(Notify, delivery.data).head)
        if head.version > len(self.times_s) - 1:
            self.times_s.extend([now] * (head.version - len(self.times_s) + 1))
        if head.phase in ("done", "failed"):
            self.phase, self.reason = head.phase, head.reason
            self.ended.set()


@app.callback()
def _bench() -> None:
    """Measure this machine."""


@app.command("round")
def round_command(
    agents: Annotated[int, typer.Option(min=1, max=64, help="Agents, each a process with a training child.")] = 4,
    params: Annotated[int, typer.Option(min=1, help="Parameters of the model, float32.")] = 10_000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to measure, after a warm-up of 20.")] = 300,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")] = False,
) -> None:
    """Measure rounds per second without training: the cost of Syncline itself.

    Example: syncline bench round --agents 4 --params 10000
    """
    check_broker("syncline bench")
    nursery = LocalFleet.preload("torch._dynamo", "syncline.tasks.noop")
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        result = runner.run(_measure(LocalFleet(FleetSettings(tuple(agent_names(agents))), nursery), params, rounds))
    if not as_json:
        seconds = result["round_s"]
        print(f"{agents} agents, {params} parameters, {result['rounds']} rounds, no training")
        print(f"{result['rounds_per_s']:.1f} rounds per second")
        figures = (f"{name} {seconds[name] * 1000:.2f} ms" for name in ("min", "median", "max"))
        print(f"a round: {', '.join(figures)}")
        return
    print(json.dumps(result))


async def _measure(fleet: LocalFleet, params: int, rounds: int) -> dict[str, Any]:
    agents = len(fleet.settings.agents)
    spec = {
        "name": "bench",
        "task": "syncline.tasks.noop:Noop",
        "task_options": {"params": params},
        "agents": {"min": agents, "lost_after_s": 30},
        "local": {"steps": 0},
        "evaluate": {"center": False},
        "stop": {"versions": WARM_UP_ROUNDS + rounds},
    }
    async with fleet:
        bus = await fleet.connect(subjects.COORDINATOR)
        try:
            watched = CommitTimes([], asyncio.Event())
            await bus.subscribe(subjects.notify("bench"), watched.on_notify)
            await submit(bus, parse(RunSpec, spec))
            await watched.ended.wait()
        finally:
            await bus.close()
    if watched.phase != "done":
        raise RunFailed(watched.reason)
    times = watched.times_s[WARM_UP_ROUNDS:]
    durations = [b - a for a, b in itertools.pairwise(times)]
    return {
        "agents": agents,
        "params": params,
        "codec": "fp32",
        "rounds": len(durations),
        "round_s": {"min": min(durations), "median": statistics.median(durations), "max": max(durations)},
        "rounds_per_s": len(durations) / (times[-1] - times[0]),
    }
