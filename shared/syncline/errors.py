"""One base error, and one class for each party that can be at fault.

An assertion is for our own bugs and crashes. Everything else says what went wrong, with which value, and what to do.
"""

from __future__ import annotations


class SynclineError(Exception):
    """Base of every error that Syncline raises on purpose."""


class ConfigError(SynclineError):
    """The user's input is wrong. Names the setting, its value and the hint; commands exit with 2."""

    def __init__(self, setting: str, problem: str, hint: str = "") -> None:
        self.setting, self.problem, self.hint = setting, problem, hint
        super().__init__(f"{setting}: {problem}" + (f". {hint}" if hint else ""))


class PeerError(SynclineError):
    """The other side sent something wrong. Counted, reported with its name, and dropped; the service goes on."""


class RunFailed(SynclineError):
    """The run cannot go on; commands exit with 1."""


class BusError(SynclineError):
    """The bus did not do what was asked. The base of all that may pass when tried again."""


class Unreachable(BusError):
    """No connection, or no answer in time: what was asked may or may not have happened."""


class NoResponders(BusError):
    """Nobody listens on the subject: the service or the stream behind it is not there."""


class Conflict(BusError):
    """A compare-and-set lost: the key holds another revision than the writer knew."""


class AlreadyPut(BusError):
    """The subject of a write-once stream holds a message already."""


class StreamFull(BusError):
    """The stream's byte or message limit is reached."""


class Denied(BusError):
    """The broker's permissions forbid it. Trying again does not help."""


class Unavailable(BusError):
    """The broker cannot offer it: no JetStream, no such stream, or a stream with another configuration."""


class StoreDown(Unavailable):
    """The broker stores nothing at present: its JetStream is off, as nats-server switches it when its disk is full."""


class Unfit(Unavailable):
    """The broker is not one to talk to: too old, without TLS, with an unknown certificate. Trying again does not help."""

    def __init__(self, problem: str, hint: str) -> None:
        self.problem, self.hint = problem, hint
        super().__init__(f"{problem}. {hint}")
