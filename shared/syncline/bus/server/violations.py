"""The broker's refusals, read from nats-server's log. Independent of connections.

The broker tells a refusal to the refused client alone; its log is the only place in which an operator can see that a
key is misused. The log names keys, and a `Keyring` names the agents behind them.

A client chooses its own name, the subject of its attempt, and the key that it claims at login, and all of them appear
in the log. The server quotes the words of clients, with `\\"` inside the quotes; the patterns in this module match the
whole line with the quotes in place, so that no text of a client can be taken for the account and key that the server
itself writes. A key *claimed* at a failed login proves nothing, for public keys are public: `who` is then the address
of the client, which the server has seen.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

READ_BYTES = 256 << 10  # of the log per call, at most, so that a flood of refusals costs the reader no more
What = Literal["publish", "subscribe", "reply", "login"]

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

    who: str  # the name behind the key; the key itself if it is unknown; at a failed login the address
    what: What  # "reply": the subject was named as the reply subject
    subject: str  # as tried, quoted as in the log; at a failed login the name or key that was claimed, or ""

    def __str__(self) -> str:
        match self.what:
            case "login":
                return f"{self.who} was refused at login" + (f" as {self.subject}" if self.subject else "")
            case "reply":
                return f"{self.who} may not name {self.subject} as a reply subject"
            case _:
                return f"{self.who} may not {self.what} {self.subject}"


class LogTail:
    """Reads the new whole lines of a log file that another process writes, and may truncate or rotate.

    If a log is rotated between two reads, its unread lines are lost: the lines are for reports, not for counting.
    """

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self._path = path
        self._inode, self._offset = self._end() if from_end else (0, 0)

    def read(self) -> list[str]:
        """Return the lines since the last call, at most READ_BYTES of them; an empty list while the file does not
        exist.
        """
        try:
            with self._path.open("rb") as file:
                self._follow(os.fstat(file.fileno()))
                file.seek(self._offset)
                data = file.read(READ_BYTES)
        except OSError:
            return []
        end = data.rfind(b"\n") + 1
        if not end and len(data) == READ_BYTES:
            end = len(data)  # no line of the server's is so long; go on behind it rather than stand still
        self._offset += end
        return data[:end].decode(errors="replace").split("\n")[:-1]

    def _follow(self, now: os.stat_result) -> None:
        if now.st_ino != self._inode or now.st_size < self._offset:
            self._inode, self._offset = now.st_ino, 0

    def _end(self) -> tuple[int, int]:
        try:
            now = self._path.stat()
        except OSError:
            return 0, 0
        return now.st_ino, now.st_size


class ViolationLog:
    """Reads refusals as they come: `read()` now and then returns those that are new."""

    def __init__(self, path: Path, names: Mapping[str, str], *, from_end: bool = False) -> None:
        self._tail = LogTail(path, from_end=from_end)
        self._names = names  # public key → name; may grow while we read, as `Keyring.names` does

    def read(self) -> list[Violation]:
        found = (parse_violation(line, self._names) for line in self._tail.read())
        return [violation for violation in found if violation is not None]


def parse_violation(line: str, names: Mapping[str, str]) -> Violation | None:
    """Return the refusal that a line of the log reports, or None for any other line."""
    if refused := _REFUSED.fullmatch(line):
        what: What = "subscribe"
        if refused["kind"] == "Publish":
            what = "reply" if refused["part"] == "Reply" else "publish"
        return Violation(names.get(refused["key"], refused["key"]), what, refused["subject"])
    if login := _LOGIN.fullmatch(line):
        claimed = login["claimed"] or ""
        return Violation(login["host"], "login", names.get(claimed, claimed))
    return None
