"""The errors of Syncline: one base class, and one class for each party that can be at fault.

A bug in Syncline itself raises an AssertionError and ends the process. Every error here names the problem, the value and, where
possible, a remedy.
"""

from __future__ import annotations

from typing import ClassVar


class SynclineError(Exception):
    """Base class of all errors that Syncline raises on purpose."""


class ConfigError(SynclineError):
    """The user's input is wrong. Commands exit with 2."""

    def __init__(self, setting: str, problem: str, hint: str = "") -> None:
        """Make an error with the text `setting: problem. hint`.

        Args:
            setting: the name of the setting, option or file that the user has to correct.
            problem: the problem, with the value.
            hint: a way to correct the value; empty if the problem says enough.
        """
        self.setting = setting
        self.problem = problem
        self.hint = hint
        super().__init__(f"{setting}: {problem}" + (f". {hint}" if hint else ""))


class PeerError(SynclineError):
    """Another process sent wrong data. The receiver counts, reports and drops the data, and continues."""


class RunFailed(SynclineError):
    """The run cannot continue. Commands exit with 1."""


class BusError(SynclineError):
    """The bus did not perform an operation. Subclasses say whether another try can succeed."""


class Unreachable(BusError):
    """No connection, or no answer in time. The operation may or may not have happened; try again later."""


class NoResponders(BusError):
    """The subject has no subscriber: its service does not run, or its stream does not exist."""


class Conflict(BusError):
    """A compare-and-set failed: the key has another revision than the writer expected. Read the key again."""


class AlreadyPut(BusError):
    """The subject of a write-once stream has a message already."""


class StreamFull(BusError):
    """The stream's limit of bytes or messages is reached, or the broker has no room for the stream."""

    hint: ClassVar[str] = (
        "Give its JetStream more room: free some of the disk that holds its store, or raise max_file_store"
    )


class BrokerFull(StreamFull):
    """The broker's account has reached its limit, whatever the limits of its streams are."""

    hint = "Raise max_file of the account in the broker's configuration, and reload it"


class DiskFull(BrokerFull):
    """The disk of the broker's store is full. nats-server writes to a stream that met this only after a restart."""

    hint = (
        "Free some of the disk that holds the broker's store, and start nats-server again: until then it stores nothing"
    )


class Denied(BusError):
    """The broker's permissions forbid the operation, or the broker refuses the login. Another try does not help."""


class Unavailable(BusError):
    """The broker cannot perform the operation: no such stream, a stream with another configuration, or too large a message."""


class StoreDown(Unavailable):
    """The broker stores no messages because its JetStream is off. A nats-server of a cluster turns JetStream off when its disk
    is full."""

    hint: ClassVar[str] = DiskFull.hint


class Unfit(Unavailable):
    """The broker must not be used: too old, without TLS, or with an unknown certificate. Trying again does not help."""

    def __init__(self, problem: str, hint: str) -> None:
        self.problem = problem
        self.hint = hint
        super().__init__(f"{problem}. {hint}")
