"""One simulated process of a service: its tasks, its connection and its training child.

A crash ends a process between two bus operations: first its connection is cut, then its tasks are cancelled, so that nothing
that its cleanup sends reaches another service. A restarted service is a new process, with the disk of the old one or without.
The cluster starts and ends processes.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from syncline_sim.inline_children import InlineTraining
from syncline_sim.loop import SimTask

TASKS = 64  # tasks of a process before finished ones are first removed from its list


class ProcessCrashed(BaseException):
    """Raised in the code of a crashed service by its next bus operation.

    It is no Exception, because the services' error handling must not catch it.
    """


@dataclass(slots=True)
class SimProcess:
    """One process of a service. `number` counts the processes of the service from 1."""

    service: str
    number: int
    tasks: list[SimTask[Any]] = field(default_factory=list)
    _max_tasks: int = TASKS
    training: InlineTraining | None = None  # an agent's training child
    dead: bool = False
    replaced: bool = False  # another coordinator was started while this one was cut off

    def add_task(self, task: SimTask[Any]) -> None:
        """Register a task. Finished tasks are removed now and then, because their results may be large."""
        self.tasks.append(task)
        if len(self.tasks) > self._max_tasks:
            self.tasks = [t for t in self.tasks if not t.done()]
            self._max_tasks = 2 * len(self.tasks) + TASKS

    @property
    def connection(self) -> str:
        return f"{self.service}/{self.number}"


current_process: ContextVar[SimProcess | None] = ContextVar(
    "process", default=None
)  # None: a task of the cluster itself
