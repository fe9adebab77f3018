"""The options of `syncline agent`. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """The flags of `syncline agent`, as plain values that travel to a forked process as JSON."""

    name: str  # "auto": that of a free key in the directory `key`
    connect: str
    tls_ca: str = ""  # files with certificates, as in `syncline.bus.tls`
    tls_cert: str = ""
    tls_key: str = ""
    key: str = ""  # path of the key file, or of a directory of them; empty: no authentication
    state_dir: str = "."
    device: str = "auto"
    threads: int = 0
    allow_task: tuple[str, ...] = ()
    task_dir: str = "."
    patience_s: float = 60.0
    log_file: str | None = None
