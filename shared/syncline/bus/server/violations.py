"""Operations that the broker refused, read from nats-server's log. This module knows the log's lines and no connection.

The broker reports a refusal to the refused client only, so its log is the only place in which an operator can see that a key is
misused. The log names public keys, and a `Keyring` maps them to the agents.

A client chooses its name, the subjects that it tries, and the key that it claims at login, and the log contains all of
them. The server quotes texts of clients, with `\\"` inside the quotes. The patterns here match whole lines with the quotes
in place, so that no text of a client can pass for the account and key that the server itself writes. A key *claimed* at a
failed login proves nothing, because public keys are public; the source of such a violation is the network address, which is
real.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

READ_BYTES = 256 << 10  # read at most this much of the log per call, which bounds the cost of a flood of refusals
Action = Literal["publish", "subscribe", "reply", "login"]

_TEXT = r'(?:[^"\\]|\\.)*'  # the text between the quotes
_CLIENT = r"\[\d+\] \S+ \S+ \[ERR\] (?P<host>\S+):\d+ - cid:\d+ - "
_REFUSED = re.compile(
    rf'{_CLIENT}(?:"{_TEXT}" - )?"[A-Z]+(?:-[a-z0-9-]+)?/nkey:(?P<key>U[A-Z2-7]+)" - '
    rf'(?P<kind>Publish|Subscription) Violation - (?P<part>Subject|Reply) "(?P<subject>{_TEXT})"'
    rf'(?:, Queue: "{_TEXT}")?(?:, SID .*)?'
)
_LOGIN = re.compile(rf'{_CLIENT}authentication error(?: - \w+ "(?P<claimed>{_TEXT})")?')


@dataclass(frozen=True, slots=True)
class Violation:
    """One refusal. `str()` is a sentence for the event feed."""

    source: str  # the name of the key's owner, or the key if it is unknown; at a failed login the network address
    action: Action  # "reply": the client named the subject as its reply subject
    subject: str  # as tried, quoted as in the log; at a failed login the name or key that was claimed, or ""

    def __str__(self) -> str:
        match self.action:
            case "login":
                return f"{self.source} was refused at login" + (f" as {self.subject}" if self.subject else "")
            case "reply":
                return f"{self.source} may not name {self.subject} as a reply subject"
            case _:
                return f"{self.source} may not {self.action} {self.subject}"


class LogTail:
    """A reader of new whole lines in a log file that another process writes, truncates and rotates.

    Lines that are rotated away between two reads are lost: the reader serves reports, not counts.
    """

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        """Start at the beginning of the file, or with `from_end` at its present end. The file need not exist."""
        self._path = path
        self._inode, self._offset = self._end() if from_end else (0, 0)

    def read(self) -> list[str]:
        """Return the lines since the last call, at most `READ_BYTES` in total. Empty while the file does not exist."""
        try:
            with self._path.open("rb") as file:
                self._follow(os.fstat(file.fileno()))
                file.seek(self._offset)
                data = file.read(READ_BYTES)
        except OSError:
            return []
        end = data.rfind(b"\n") + 1
        if not end and len(data) == READ_BYTES:
            end = len(data)  # the server writes no line this long; skip the data instead of reading it for ever
        self._offset += end
        return data[:end].decode(errors="replace").split("\n")[:-1]

    def _follow(self, now: os.stat_result) -> None:
        """Start again at the beginning if the file was replaced or truncated."""
        if now.st_ino != self._inode or now.st_size < self._offset:
            self._inode, self._offset = now.st_ino, 0

    def _end(self) -> tuple[int, int]:
        try:
            now = self._path.stat()
        except OSError:
            return 0, 0
        return now.st_ino, now.st_size


class ViolationLog:
    """A reader of the refusals in a broker's log. Call `read` from time to time."""

    def __init__(self, path: Path, names: Mapping[str, str], *, from_end: bool = False) -> None:
        self._tail = LogTail(path, from_end=from_end)
        self._names = names  # public key → name; a live view such as `Keyring.names` may grow between two reads

    def read(self) -> list[Violation]:
        """Return the refusals since the last call."""
        found = (parse_violation(line, self._names) for line in self._tail.read())
        return [violation for violation in found if violation is not None]


def parse_violation(line: str, names: Mapping[str, str]) -> Violation | None:
    """Return the refusal that a line of the log reports, or None for any other line.

    Args:
        line: a line of nats-server's log, without its end.
        names: public key → name of the owner.
    """
    if refused := _REFUSED.fullmatch(line):
        action: Action = "subscribe"
        if refused["kind"] == "Publish":
            action = "reply" if refused["part"] == "Reply" else "publish"
        return Violation(names.get(refused["key"], refused["key"]), action, refused["subject"])
    if login := _LOGIN.fullmatch(line):
        claimed = login["claimed"] or ""
        return Violation(login["host"], "login", names.get(claimed, claimed))
    return None
