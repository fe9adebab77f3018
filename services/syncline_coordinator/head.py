"""Head, changed by compare-and-set alone, and told to everybody after every change."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from syncline.bus.base import Bus
from syncline.bus.blobs import with_retries
from syncline.errors import BusError, Conflict, NoResponders, SynclineError, Unreachable
from syncline.policy.states import PHASE_TRANSITIONS, check_transition
from syncline.wire import subjects
from syncline.wire.chunks import content_bytes
from syncline.wire.messages import ENDED, MAX_HEAD_BYTES, Head, Notify, Roster, decode, encode

VerifyDurable = Callable[[], Awaitable[None]]
NOTIFY_ROSTER_BYTES = 64 * 1024


class Deposed(SynclineError):
    """Another coordinator has written head: this one must stop, and has changed nothing."""


class RolledBack(Deposed):
    """The broker has lost writes that it had acknowledged, as after a power failure: this coordinator must begin again from
    what is there, under a term higher than `term`, the highest that anybody has seen. `agent`: on whose word; '' where the bus
    itself shows it."""

    def __init__(self, what: str, term: int, agent: str = "") -> None:
        self.term, self.agent = term, agent
        super().__init__(f"the broker has lost what it had acknowledged: {what}")


class HeadKeeper:
    """The current head of a run, as this coordinator wrote it last."""

    def __init__(self, bus: Bus, head: Head, revision: int, value: bytes) -> None:
        self._bus, self.head, self._revision, self._value = bus, head, revision, value

    @classmethod
    async def create(cls, bus: Bus, head: Head) -> HeadKeeper:
        """The first head of a run. Raises Conflict where there is one."""
        value = _encoded(head)
        revision = await bus.kv_create(subjects.RUNS_BUCKET, subjects.head_key(head.run), value)
        return cls(bus, head, revision, value)

    @classmethod
    async def read(cls, bus: Bus, run: str) -> HeadKeeper | None:
        entry = await with_retries(lambda: bus.kv_get(subjects.RUNS_BUCKET, subjects.head_key(run)))
        return None if entry is None else cls(bus, decode(Head, entry.value), entry.revision, entry.value)

    async def write(
        self,
        head: Head,
        roster: Roster | None = None,
        *,
        tell: bool = True,
        verify_durable: VerifyDurable | None = None,
    ) -> None:
        """Moves head on, and tells everybody, unless nobody has anything to do about it.

        Raises Deposed where another coordinator was faster. An answer that does not come is *unknown*: head is read again,
        and is ours if it holds what we wrote. `verify_durable()` before it is written once more: what it names may be lost.
        """
        check_transition(PHASE_TRANSITIONS, self.head.phase, head.phase)
        key, value = subjects.head_key(head.run), _encoded(head)
        try:
            self._revision = await self._bus.kv_update(subjects.RUNS_BUCKET, key, value, self._revision)
        except Conflict:  # refused at the first try: what is there is another's, even where its bytes equal ours
            await self.check()
            raise Deposed(f"{key} was changed by another coordinator: it is in charge of this run") from None
        except (Unreachable, NoResponders):
            self._revision = await with_retries(lambda: self._write_again(key, value, verify_durable))
        self.head, self._value = head, value
        if tell:
            await self.notify(roster)

    async def check(self, seen_term: int = 0) -> Head:
        """What is there. Raises Deposed where another coordinator took over without our noticing: what is offered now is not
        for us; RolledBack where the bus does not hold what we have read or written. `seen_term`: the highest anybody told of.
        """
        key, term = subjects.head_key(self.head.run), max(seen_term, self.head.term)
        revision, value = self._revision, self._value  # before we ask: head may be written meanwhile
        entry = await with_retries(lambda: self._bus.kv_get(subjects.RUNS_BUCKET, key))
        if entry is None:
            raise RolledBack(f"{key} is gone", term)
        there = decode(Head, entry.value)
        if there.term > self.head.term:
            raise Deposed(f"{key} holds term {there.term}: another coordinator is in charge of this run")
        given_again = entry.revision == revision and entry.value != value
        if entry.revision < revision or given_again:
            raise RolledBack(f"{key} holds term {there.term}, version {there.version}", term)
        return there

    async def is_newest(self) -> bool:
        """Whether head still is as it was read or written here."""
        key = subjects.head_key(self.head.run)
        entry = await with_retries(lambda: self._bus.kv_get(subjects.RUNS_BUCKET, key))
        return entry is not None and (entry.revision, entry.value) == (self._revision, self._value)

    async def is_taken(self) -> bool:
        """Whether the run goes on under another coordinator's term."""
        there = await HeadKeeper.read(self._bus, self.head.run)
        return there is not None and there.head.term > self.head.term and there.head.phase not in ENDED

    async def is_orphan(self) -> bool:
        """Whether it was made for a spec which the broker then lost, so that the run's name is free."""
        spec = await with_retries(lambda: self._bus.kv_get(subjects.RUNS_BUCKET, subjects.spec_key(self.head.run)))
        return spec is None and self.head.version == 0 and self.head.phase not in ENDED

    async def notify(self, roster: Roster | None = None) -> None:
        """A hint; whoever misses it reads head again in a few seconds."""
        said = encode(roster) if roster is not None else b""
        room = min(NOTIFY_ROSTER_BYTES, content_bytes(self._bus.max_payload))  # agents get a larger one by its blob
        note = Notify(head=_encoded(self.head), roster=said if len(said) <= room else b"")
        try:
            await self._bus.publish(subjects.notify(self.head.run), encode(note))
        except BusError:
            pass

    async def _write_again(self, key: str, value: bytes, verify_durable: VerifyDurable | None) -> int:
        entry = await self._bus.kv_get(subjects.RUNS_BUCKET, key)
        if entry is not None and entry.value == value:
            return entry.revision
        if entry is None or (entry.revision, entry.value) != (self._revision, self._value):
            await self.check()
            raise Deposed(f"{key} was changed by another coordinator: it is in charge of this run")
        if verify_durable is not None:
            await verify_durable()
        try:
            return await self._bus.kv_update(subjects.RUNS_BUCKET, key, value, self._revision)
        except Conflict as error:
            raise Unreachable(str(error)) from None  # read once more: it may be our own first try


def _encoded(head: Head) -> bytes:
    data = encode(head)
    assert len(data) <= MAX_HEAD_BYTES, f"head has {len(data)} bytes"
    return data
