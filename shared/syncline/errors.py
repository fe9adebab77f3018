"""The errors that Syncline raises on purpose: one base, and one class for each party that can be at fault.

An assertion is for a bug of Syncline and ends the process. Every other error names the cause, the value and the remedy.
"""

from __future__ import annotations


class SynclineError(Exception):
    """Base of every error that Syncline raises on purpose."""


class ConfigError(SynclineError):
    """The user's input is wrong: names the setting, its value and a hint. Commands exit with 2."""

    def __init__(self, setting: str, problem: str, hint: str = "") -> None:
        self.setting, self.problem, self.hint = setting, problem, hint
        super().__init__(f"{setting}: {problem}" + (f". {hint}" if hint else ""))


class PeerError(SynclineError):
    """A message of another process is wrong. The reader counts it, reports it with the sender's name, drops it and goes
    on.
    """


class RunFailed(SynclineError):
    """The run cannot go on. Commands exit with 1."""


class BusError(SynclineError):
    """The bus did not do its work. Base of all errors that may pass when the call is repeated."""


class Unreachable(BusError):
    """The connection is lost, or no answer came in time: the request may or may not have been carried out."""


class NoResponders(BusError):
    """The subject has no subscriber: the service or the stream behind it is missing."""


class Conflict(BusError):
    """A compare-and-set lost: the key holds another revision than the writer knew."""


class AlreadyPut(BusError):
    """The subject of a write-once stream holds a message already."""


class StreamFull(BusError):
    """The stream's limit of bytes or messages is reached."""


class Denied(BusError):
    """The broker's permissions forbid the request. A repetition does not help."""


class Unavailable(BusError):
    """The broker cannot carry out the request: JetStream or the stream is missing, or the stream has another
    configuration.
    """


class StoreDown(Unavailable):
    """The broker stores nothing at present: its JetStream is off. nats-server switches JetStream off when its disk is
    full.
    """


class Unfit(Unavailable):
    """The broker is too old, without TLS, or has an unknown certificate. A repetition does not help."""

    def __init__(self, problem: str, hint: str) -> None:
        self.problem, self.hint = problem, hint
        super().__init__(f"{problem}. {hint}")
