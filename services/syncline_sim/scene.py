"""What a simulation is given, and what it comes to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from syncline.bus.server.accounts import MAX_PAYLOAD_BYTES
from syncline.spec.run_spec import RunSpec, parse
from syncline.wire.messages import Head
from syncline_sim.inline import TASK


@dataclass(frozen=True, slots=True)
class Scene:
    """Who plays, and how. `children`: stubs of a few numbers, or the task's own model."""

    spec: RunSpec
    agents: tuple[str, ...] = ("a1", "a2", "a3", "a4")
    period_s: tuple[float, ...] = (0.1,)  # a local period of each agent, in turns
    starts_s: tuple[float, ...] = (0.0,)  # when each of them is started
    longest_delay_s: float = 0.002
    shuffled: bool = False  # callbacks that are ready at one instant run in any order
    children: Literal["stub", "real"] = "stub"
    task_dir: Path = Path()
    max_payload: int = MAX_PAYLOAD_BYTES  # of the broker


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulated run came to."""

    head: Head | None
    problems: tuple[str, ...]
    timeline: tuple[str, ...]
    operations: dict[str, int]  # bus operations of each service
    trace: str  # a digest over every bus operation with its time
    seconds: float  # virtual
    merged: tuple[tuple[str, ...], ...] = ()  # the agents of each version

    @property
    def failed(self) -> bool:
        return bool(self.problems)


def small_spec(**changes: Any) -> RunSpec:
    """A run of stubs: six versions, no evaluation."""
    base: dict[str, Any] = {
        "name": "r", "task": TASK, "agents": {"min": 4, "lost_after_s": 2.0}, "local": {"steps": 4},
        "evaluate": {"center": False}, "stop": {"versions": 6},
    }  # fmt: skip
    return parse(RunSpec, {**base, **changes})
