"""Every subject, stream and key name in one place. Pure: knows no bus and no message.

All subjects are `syncline.v1.<run>.…`, one token per name, so that a broker permission can be written for each of them.
The token after `agent.` *is* the agent's identity: the broker lets agent `a1` publish under `…agent.a1.>` alone.
"""

from __future__ import annotations

import re

from syncline.errors import ConfigError, PeerError

PREFIX = "syncline.v1"
RUNS_BUCKET = "syncline-runs"
FLEET = "fleet"  # the run token of what concerns no single run
COORDINATOR = "coordinator"
BROKER = "broker"
AUTO = "auto"  # in place of an agent's name: whichever key is free
RESERVED = frozenset({FLEET, COORDINATOR, BROKER, AUTO, "dashboard", "data", "watch"})
NAME = re.compile(r"[a-z0-9-]{1,63}")


def checked_name(setting: str, name: str) -> str:
    """The name itself, or a ConfigError: names are `[a-z0-9-]{1,63}`, because they are tokens of subjects."""
    if not NAME.fullmatch(name):
        raise ConfigError(setting, f"{name!r} is not a name", "Use 1 to 63 of a-z, 0-9 and '-'")
    if name in RESERVED:
        raise ConfigError(setting, f"{name!r} is reserved", f"Choose another than {', '.join(sorted(RESERVED))}")
    return name


def spec_key(run: str) -> str:
    return f"{run}.spec"


def head_key(run: str) -> str:
    return f"{run}.head"


def updates_stream(run: str) -> str:
    return f"SYNCLINE_UPDATES_{run}"


def offers_stream(run: str) -> str:
    return f"SYNCLINE_OFFERS_{run}"


def model_stream(run: str) -> str:
    return f"SYNCLINE_MODEL_{run}"


def log_stream(run: str) -> str:
    return f"SYNCLINE_LOG_{run}"


def update_prefix(run: str, agent: str, blob: str) -> str:
    """A chunk's subject is this and its number: `update_prefix(…) + ".7"`."""
    return f"{PREFIX}.{run}.agent.{agent}.update.{blob}"


def every_update(run: str) -> str:
    """Chunks and nothing else: what the updates stream takes, its coordinator can find and purge."""
    return f"{update_prefix(run, '*', '*')}.*"


def model_prefix(run: str, blob: str) -> str:
    return f"{PREFIX}.{run}.model.{blob}"


def outer_prefix(run: str, blob: str) -> str:
    return f"{PREFIX}.{run}.outer.{blob}"


def offer(run: str, agent: str) -> str:
    return f"{PREFIX}.{run}.agent.{agent}.offer"


def heartbeat(run: str, agent: str) -> str:
    return f"{PREFIX}.{run}.agent.{agent}.heartbeat"


def hello(agent: str) -> str:
    return f"{PREFIX}.{FLEET}.agent.{agent}.hello"


def submit() -> str:
    return f"{PREFIX}.{FLEET}.submit"


def stop() -> str:
    return f"{PREFIX}.{FLEET}.stop"


def story() -> str:
    return f"{PREFIX}.{FLEET}.story"


def log_record(run: str, version: int | str, term: int | str) -> str:
    return f"{PREFIX}.{run}.log.{version}.{term}"


def log_blob(run: str, version: int, term: int, blob: str) -> str:
    """The chunks of a commit record that is too large for its line in the log."""
    return f"{log_record(run, version, term)}.{blob}"


def probe(run: str) -> str:
    """Of a stream that is there for a moment, to learn whether a run would find space."""
    return f"{PREFIX}.{run}.probe"


def notify(run: str) -> str:
    return f"{PREFIX}.{run}.notify"


def metrics(run: str, who: str, what: str) -> str:
    return f"{PREFIX}.{run}.metrics.{who}.{what}"


def events(run: str, who: str) -> str:
    return f"{PREFIX}.{run}.events.{who}"


def agent_of(subject: str) -> str:
    """The agent a subject belongs to, as the broker let it through."""
    tokens = subject.split(".")
    if len(tokens) < 6 or tokens[3] != "agent":
        raise PeerError(f"{subject!r} is no agent's subject")
    return tokens[4]


def run_of(subject: str) -> str:
    return subject.split(".")[2]
