"""Every subject, stream and key name in one place. This module knows neither bus nor message.

All subjects are `syncline.v1.<run>.…`, one token per name, so that a broker permission can be written for each of them.
The token after `agent.` *is* the agent's identity: the broker lets agent `a1` publish under `…agent.a1.>` alone.
"""

from __future__ import annotations

import re

from syncline.errors import ConfigError, PeerError

PREFIX = "syncline.v1"
RUNS_BUCKET = "syncline-runs"
FLEET = "fleet"  # the run token of subjects that concern no single run
COORDINATOR = "coordinator"
BROKER = "broker"
AUTO = "auto"  # in place of an agent's name: any key that is free
RESERVED = frozenset({FLEET, COORDINATOR, BROKER, AUTO, "dashboard", "data", "watch"})
NAME = re.compile(r"[a-z0-9-]{1,63}")


def checked_name(setting: str, name: str) -> str:
    """Return the name itself.

    Raises:
        ConfigError: the name is reserved or not of the form `[a-z0-9-]{1,63}`, which tokens of subjects have.
    """
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
    """Return the subject of an update's chunks without the chunk number: `update_prefix(…) + ".7"` is the subject of
    chunk 7.
    """
    return f"{PREFIX}.{run}.agent.{agent}.update.{blob}"


def every_update(run: str) -> str:
    """Return the pattern of all chunks of updates, which the updates stream takes.

    The pattern has exactly one token after the blob id. A stream that took more could hold messages that the
    coordinator neither finds nor purges.
    """
    return f"{update_prefix(run, '*', '*')}.*"


def model_prefix(run: str, blob: str) -> str:
    """Return the subject of the chunks of a model or record without the chunk number."""
    return f"{PREFIX}.{run}.model.{blob}"


def outer_prefix(run: str, blob: str) -> str:
    """Return the subject of the chunks of the outer state beside a model, without the chunk number."""
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
    """Return the subject of a line in the log of commits. Either number may be the wildcard `*`."""
    return f"{PREFIX}.{run}.log.{version}.{term}"


def log_blob(run: str, version: int, term: int, blob: str) -> str:
    """Return the subject of the chunks of a commit record that is too large for its line in the log, without the chunk
    number.
    """
    return f"{log_record(run, version, term)}.{blob}"


def probe(run: str) -> str:
    """Return the subject of a stream that exists for a moment, to learn whether a run would find space."""
    return f"{PREFIX}.{run}.probe"


def notify(run: str) -> str:
    return f"{PREFIX}.{run}.notify"


def metrics(run: str, who: str, what: str) -> str:
    return f"{PREFIX}.{run}.metrics.{who}.{what}"


def events(run: str, who: str) -> str:
    return f"{PREFIX}.{run}.events.{who}"


def agent_of(subject: str) -> str:
    """Return the agent that a subject belongs to. The broker enforces this identity.

    Raises:
        PeerError: the subject belongs to no agent.
    """
    tokens = subject.split(".")
    if len(tokens) < 6 or tokens[3] != "agent":
        raise PeerError(f"{subject!r} is not an agent's subject")
    return tokens[4]


def run_of(subject: str) -> str:
    """Return the run that a subject belongs to, or `fleet`."""
    return subject.split(".")[2]
