"""A bus of dicts for unit tests, with faults that the test orders."""

from __future__ import annotations

import asyncio
from collections import deque

from syncline.bus.base import Entry, Stored
from syncline.errors import AlreadyPut, Conflict, Unreachable


class FakeBus:
    """Messages by subject, written once; keys with revisions. `fail` makes the next calls of an operation fail."""

    max_payload = 1 << 20

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.keys: dict[str, Entry] = {}
        self.published: list[tuple[str, bytes]] = []
        self.calls: list[tuple[str, str]] = []
        self.under_way = self.most_under_way = 0
        self._faults: dict[str, deque[Exception | None]] = {}
        self._lost_answers: list[str] = []

    def fail(self, operation: str, *errors: Exception | None) -> None:
        """The next calls of the operation raise these, one each, and do nothing; None lets one through."""
        self._faults.setdefault(operation, deque()).extend(errors)

    def lose_answer(self, operation: str) -> None:
        """The next call of the operation does its work, and then says that no answer came."""
        self._lost_answers.append(operation)

    async def put(self, subject: str, data: bytes, *, bulk: bool = False) -> int:
        await self._call("put", subject)
        if subject in self.held:
            raise AlreadyPut(subject)
        self.held[subject] = bytes(data)
        self._answer("put")
        return len(self.held)

    async def get(self, stream: str, subject: str, *, bulk: bool = False) -> Stored | None:
        await self._call("get", f"{stream} {subject}")
        return Stored(subject, self.held[subject], 1, 0.0) if subject in self.held else None

    async def kv_get(self, bucket: str, key: str) -> Entry | None:
        await self._call("kv_get", key)
        return self.keys.get(key)

    async def kv_create(self, bucket: str, key: str, value: bytes) -> int:
        await self._call("kv_create", key)
        return self._write(key, value, 0)

    async def kv_update(self, bucket: str, key: str, value: bytes, revision: int) -> int:
        await self._call("kv_update", key)
        written = self._write(key, value, revision)
        self._answer("kv_update")
        return written

    async def publish(self, subject: str, data: bytes) -> None:
        await self._call("publish", subject)
        self.published.append((subject, data))

    def _write(self, key: str, value: bytes, revision: int) -> int:
        there = self.keys[key].revision if key in self.keys else 0
        if there != revision:
            raise Conflict(f"{key} is at revision {there}, not {revision}")
        self.keys[key] = Entry(value, revision + 1)
        return revision + 1

    def _answer(self, operation: str) -> None:
        if operation in self._lost_answers:
            self._lost_answers.remove(operation)
            raise Unreachable("no answer in time")

    async def _call(self, operation: str, what: str) -> None:
        self.calls.append((operation, what))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await asyncio.sleep(0)  # others get their turn
        self.under_way -= 1
        error = faults.popleft() if (faults := self._faults.get(operation)) else None
        if error is not None:
            raise error
