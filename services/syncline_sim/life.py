"""One process life of a service: its tasks, its connection, its training child, and whether it is over.

A crash ends a life between two bus operations: its connection is cut first and its tasks are cancelled then, so that nothing
it does on its way out reaches anybody. Started again it is a new life, with the disk of the old one or without. It is the
world that begins and ends lives.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from syncline_sim.inline import InlineTraining
from syncline_sim.loop import SimTask

TASKS = 64  # of a life, before the first look for those that are done


class Crashed(BaseException):
    """What a service's code meets at the bus after its crash. No error: nobody is left to handle it."""


@dataclass(slots=True)
class Life:
    """One process life of a service."""

    service: str
    number: int
    tasks: list[SimTask[Any]] = field(default_factory=list)
    _most: int = TASKS
    training: InlineTraining | None = None
    dead: bool = False
    replaced: bool = False  # by another coordinator, while it was cut off

    def begins(self, task: SimTask[Any]) -> None:
        """One of its tasks. Those that are done are forgotten now and then: they may hold much."""
        self.tasks.append(task)
        if len(self.tasks) > self._most:
            self.tasks = [t for t in self.tasks if not t.done()]
            self._most = 2 * len(self.tasks) + TASKS

    @property
    def connection(self) -> str:
        return f"{self.service}/{self.number}"


whose_task: ContextVar[Life | None] = ContextVar("life", default=None)  # runs; None for the world's own
