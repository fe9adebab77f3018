"""The words in which agents and people are told no."""

from __future__ import annotations

from syncline.bus.blobs import BlobGone
from syncline.bus.server.accounts import MAX_PAYLOAD_BYTES
from syncline.errors import ConfigError
from syncline.wire.chunks import LEAST_PAYLOAD_BYTES
from syncline.wire.messages import ENDED, Head, Welcome


def exists(head: Head) -> ConfigError:
    there, other = f"there is a run {head.run!r} already", "or choose another name (--name)"
    if head.phase in ENDED:
        mend = f"See how it went with `syncline why {head.run}`, {other}"
        return ConfigError("name", f"{there}, and it has ended: {head.reason}", mend)
    mend = f"Follow it with `syncline watch {head.run}`, end it with `syncline stop {head.run}`, {other}"
    return ConfigError("name", f"{there}: {head.phase}, at version {head.version}", mend)


def payload_too_small(max_payload: int) -> ConfigError:
    """Say what a broker must let through in one message."""
    problem = f"the broker takes messages of at most {max_payload} bytes, a run needs {LEAST_PAYLOAD_BYTES}"
    hint = f"Set max_payload: {MAX_PAYLOAD_BYTES} in the broker's configuration, on every server alike, and reload it"
    return ConfigError("max_payload", problem, hint)


def gone(name: str, error: BlobGone) -> str:
    """Why a run fails whose head names what the broker has lost."""
    mend = f"Give the broker its store back, or submit the run again under another name; {name} itself cannot go on"
    return f"what head names is not on the bus any more: {error}. {mend}"


def superseded(agent: str) -> Welcome:
    return Welcome(superseded=True, reason=f"another process has claimed the name {agent}")
