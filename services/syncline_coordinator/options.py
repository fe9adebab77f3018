"""The flags of `syncline coordinator`, as plain values. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CoordinatorOptions:
    """The flags of `syncline coordinator`, as plain values."""

    connect: str
    tls_ca: str = ""  # files with certificates, as in `syncline.bus.tls`
    tls_cert: str = ""
    tls_key: str = ""
    key: str = ""  # path of the key file; empty: no authentication
    threads: int = 0
    allow_task: tuple[str, ...] = ()
    task_dir: str = "."
    broker_log: str = ""  # permission violations in this log are told as events
    keys: str = ""  # directory of the fleet's keys, to name the agents in that log
    patience_s: float = 60.0
    log_file: str | None = None
