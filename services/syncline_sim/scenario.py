"""The input and the outcome of a simulation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from syncline.bus.server.accounts import MAX_PAYLOAD_BYTES
from syncline.spec.run_spec import RunSpec, parse
from syncline.wire.messages import Head
from syncline_sim.inline_children import TASK


@dataclass(frozen=True, slots=True)
class Scenario:
    """The fleet, the network and the run of a simulation; faults and seed are given beside it.

    Per-agent values are dealt out in turn: with two periods, the first and the third agent have the first one.
    """

    spec: RunSpec
    agents: tuple[str, ...] = ("a1", "a2", "a3", "a4")
    period_s: tuple[float, ...] = (0.1,)  # duration of an agent's local period
    starts_s: tuple[float, ...] = (0.0,)  # start time of an agent
    longest_delay_s: float = 0.002  # of a message
    shuffled: bool = False  # callbacks that are ready at the same instant run in random order
    children: Literal["stub", "real"] = "stub"  # `real`: the spec's task is trained
    task_dir: Path = Path()
    max_payload: int = MAX_PAYLOAD_BYTES  # of the broker


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a simulation."""

    head: Head | None
    problems: tuple[str, ...]  # violated invariants; the simulation stops at the first
    timeline: tuple[str, ...]
    operations: dict[str, int]  # service → number of its bus operations
    trace: str  # digest of every bus operation with its time
    seconds: float  # virtual
    merged: tuple[tuple[str, ...], ...] = ()  # the agents merged into each version, from version 1

    @property
    def failed(self) -> bool:
        return bool(self.problems)


def small_spec(**changes: Any) -> RunSpec:
    """Return the spec of a run of stubs: four agents, six versions, no evaluation."""
    base: dict[str, Any] = {
        "name": "r", "task": TASK, "agents": {"min": 4, "lost_after_s": 2.0}, "local": {"steps": 4},
        "evaluate": {"center": False}, "stop": {"versions": 6},
    }  # fmt: skip
    return parse(RunSpec, {**base, **changes})
