"""The options of the coordinator's process. This module imports no heavy library: the command line reads it at its start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CoordinatorOptions:
    """The options of `syncline coordinator`, as plain values."""

    connect: str  # addresses of the broker
    tls_ca: str = ""  # path of a certificate file; this one and the next two as in `syncline.bus.tls`
    tls_cert: str = ""
    tls_key: str = ""
    key: str = ""  # path of the key file; empty: no authentication
    threads: int = 0  # of torch in the evaluating child; 0: torch's default
    allow_task: tuple[str, ...] = ()  # patterns of tasks that may be loaded
    task_dir: str = "."  # directory to which the paths of task files are relative
    broker_log: str = ""  # path of the broker's log, whose permission violations are published as events
    keys: str = ""  # directory of the fleet's keys, to name the agents in that log
    patience_s: float = 60.0  # the longest time to wait for the first connection
    log_file: str | None = None  # None: standard error
