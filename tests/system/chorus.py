"""Hundreds of agents that only speak: a bare client publishes what they would, as fast as they would.

`python tests/system/chorus.py nats://127.0.0.1:4222 400` does it until it is interrupted, to look at `syncline watch`.
"""

from __future__ import annotations

import asyncio
import math
import random
import sys
from dataclasses import dataclass, field

import nats
from nats.aio.client import Client

from syncline.observe.telemetry import CenterEval, Event, FleetStatus, Published, Round, RunStatus, Train
from syncline.wire import subjects

COORDINATOR = subjects.COORDINATOR
TICK_S = 0.2
TICKS_A_ROUND = 10


@dataclass
class Chorus:
    """A run of `agents`: a round every two seconds, a few late in each, and now and then one is lost and comes back."""

    client: Client
    agents: int
    run: str = "chorus"
    versions: int = 500
    tick: int = 0
    published: int = 0
    lost: set[str] = field(default_factory=set)
    chance: random.Random = field(default_factory=lambda: random.Random(7))

    @property
    def names(self) -> list[str]:
        return [f"edge-{i}" for i in range(1, self.agents + 1)]

    async def sing(self) -> None:
        while True:
            await self.one_tick()
            await asyncio.sleep(TICK_S)

    async def one_tick(self) -> None:
        """What is said in a fifth of a second: something of every agent, and what the coordinator has to say."""
        self.tick += 1
        version, step = divmod(self.tick, TICKS_A_ROUND)
        for i, name in enumerate(self.names):
            if name not in self.lost:
                await self._say(name, self._train(i, version, step))
        if step == 0:
            await self._round(version)
        if step in (0, 5):
            status = self.status("training")
            await self._say(COORDINATOR, status)
            await self._publish(
                subjects.metrics(subjects.FLEET, COORDINATOR, FleetStatus.kind),
                FleetStatus(agents=status.agents, run=self.run, queued=[]),
            )

    async def end(self) -> None:
        await self._say(COORDINATOR, self.status("done"))
        await self.event("run-done", f"run {self.run}: {self.versions} versions")

    async def event(self, kind: str, text: str, level: str = "info", agent: str = "") -> None:
        said = Event.model_validate({"event": kind, "level": level, "text": text, "agent": agent})
        await self._publish(subjects.events(self.run, COORDINATOR), said)

    def status(self, phase: str) -> RunStatus:
        return RunStatus(
            task="syncline.tasks.digits:Digits",
            phase=phase,
            version=self.tick // TICKS_A_ROUND,
            versions=self.versions,
            agents=self.agents - len(self.lost),
            needed=self.agents // 2,
            lost=sorted(self.lost),
            reason=f"{self.versions} versions" if phase == "done" else f"quorum {self.agents - 10} of {self.agents}",
        )

    async def _round(self, version: int) -> None:
        here = [name for name in self.names if name not in self.lost]
        late = self.chance.sample(here, min(3, len(here) // 2))
        metric = Round(
            version=version,
            closed_by=f"quorum {len(here) - len(late)} of {len(here)} + 0.5 s",
            merged=len(here) - len(late),
            late=late,
            seconds=1.9,
            collect_s=1.7,
            merge_s=0.15,
            bytes_up=version * self.agents * 40_000,
            bytes_down=version * 40_000,
        )
        await self._say(COORDINATOR, metric)
        accuracy = 0.99 - 0.6 * math.exp(-version / 12) + self.chance.uniform(-0.005, 0.005)
        metrics: dict[str, float | None] = {"accuracy": accuracy, "loss": 1.2 * math.exp(-version / 15) + 0.05}
        await self._say(COORDINATOR, CenterEval(version=version, metrics=metrics, seconds=0.2))
        for name in late:
            await self.event("update-dropped", f"{name}: update of clock {version} dropped: late", "warning", name)
        if self.lost and version % 4 == 0:
            back = self.lost.pop()
            await self.event("agent-joined", f"{back} joined", agent=back)
        elif version % 2 == 1 and here:
            gone = self.chance.choice(here)
            self.lost.add(gone)
            await self.event("agent-lost", f"{gone} lost: not heard of for 10.2 s", "warning", gone)

    def _train(self, i: int, version: int, step: int) -> Train:
        done = min(20, round(step * 2.5 * (0.6 + (i % 7) / 10)))
        return Train(
            state="waiting" if done == 20 else "training",
            version=version - (i % 50 == 0),
            clock=version,
            step=done,
            steps=20,
            loss=1.5 * math.exp(-version / 10) * (0.8 + (i % 9) / 20),
            samples_per_s=900.0 + 37 * (i % 40),
            part=i,
            rows=300 + i % 90,
            bytes_up=40_000 * version,
            bytes_down=40_000 * version,
        )

    async def _say(self, who: str, metric: Published) -> None:
        await self._publish(subjects.metrics(self.run, who, metric.kind), metric)

    async def _publish(self, subject: str, published: Published) -> None:
        self.published += 1
        await self.client.publish(subject, published.model_dump_json().encode())


async def main(url: str, agents: int) -> None:
    client = await nats.connect(url)
    try:
        await Chorus(client, agents).sing()
    finally:
        await client.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
