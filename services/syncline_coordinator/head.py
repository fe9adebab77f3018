"""The head record of a run: read, changed by compare-and-set only, and announced to the agents after each change."""

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
NOTIFY_ROSTER_BYTES = 64 * 1024  # agents read a larger roster from its blob


class Deposed(SynclineError):
    """Another coordinator has written head. This coordinator must stop, and has changed nothing."""


class RolledBack(Deposed):
    """The broker has lost writes that it had acknowledged, for example in a power failure.

    This coordinator must open the run again from the head that the broker has, under a term above `term`.

    Args:
        evidence: the figures that show the loss.
        term: the highest term seen so far.
        agent: the agent on whose report alone the loss rests; '' if the bus itself shows the loss.
    """

    def __init__(self, evidence: str, term: int, agent: str = "") -> None:
        self.term = term
        self.agent = agent
        super().__init__(f"the broker has lost writes that it had acknowledged: {evidence}")


class HeadKeeper:
    """The current head of a run, as this coordinator has read or written it last."""

    def __init__(self, bus: Bus, head: Head, revision: int, value: bytes) -> None:
        self.head = head
        self._bus = bus
        self._revision = revision
        self._value = value

    @classmethod
    async def create(cls, bus: Bus, head: Head) -> HeadKeeper:
        """Write the first head of a run. Raises Conflict if the run has a head."""
        value = _encoded(head)
        revision = await bus.kv_create(subjects.RUNS_BUCKET, subjects.head_key(head.run), value)
        return cls(bus, head, revision, value)

    @classmethod
    async def read(cls, bus: Bus, run: str) -> HeadKeeper | None:
        """Read the head of a run. Return None for a run without a head. Raises PeerError for a head that is not valid."""
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
        """Replace head by compare-and-set.

        If no answer arrives, the result is unknown. Head is read then: if it holds the new value, the write succeeded; if it
        still holds the old value, the write is repeated.

        Args:
            roster: the roster that `head` names, for the notification.
            tell: notify the agents. Not needed for a change that they do not act on.
            verify_durable: called before a repeated write; raises if the broker has lost a blob that `head` names.

        Raises:
            Deposed: another coordinator has changed head.
            RolledBack: the broker has lost the head that this coordinator has read or written.
        """
        check_transition(PHASE_TRANSITIONS, self.head.phase, head.phase)
        key = subjects.head_key(head.run)
        value = _encoded(head)
        try:
            self._revision = await self._bus.kv_update(subjects.RUNS_BUCKET, key, value, self._revision)
        except Conflict:  # at the first try: the stored value is another coordinator's, even if its bytes equal ours
            await self.check()
            raise Deposed(f"{key} was changed by another coordinator: it is in charge of this run") from None
        except (Unreachable, NoResponders):
            self._revision = await with_retries(lambda: self._write_again(key, value, verify_durable))
        self.head = head
        self._value = value
        if tell:
            await self.notify(roster)

    async def check(self, seen_term: int = 0) -> Head:
        """Read head and compare it with the head that this coordinator has read or written last.

        Args:
            seen_term: the highest term that an agent has reported, for the RolledBack that is raised.

        Returns:
            The head on the bus.

        Raises:
            Deposed: head has a higher term. Offers may be meant for the coordinator of that term.
            RolledBack: the bus does not hold the head that this coordinator has read or written.
        """
        key = subjects.head_key(self.head.run)
        term = max(seen_term, self.head.term)
        # Both are taken before the bus is asked: another task may write head meanwhile.
        revision = self._revision
        value = self._value
        entry = await with_retries(lambda: self._bus.kv_get(subjects.RUNS_BUCKET, key))
        if entry is None:
            raise RolledBack(f"{key} is gone", term)
        found = decode(Head, entry.value)
        if found.term > self.head.term:
            raise Deposed(f"{key} holds term {found.term}: another coordinator is in charge of this run")
        revision_reused = entry.revision == revision and entry.value != value
        if entry.revision < revision or revision_reused:
            raise RolledBack(f"{key} holds term {found.term}, version {found.version}", term)
        return found

    async def is_newest(self) -> bool:
        """Return whether the bus still holds the head that was read or written here."""
        key = subjects.head_key(self.head.run)
        entry = await with_retries(lambda: self._bus.kv_get(subjects.RUNS_BUCKET, key))
        return entry is not None and (entry.revision, entry.value) == (self._revision, self._value)

    async def is_taken(self) -> bool:
        """Return whether another coordinator drives the run under a higher term."""
        found = await HeadKeeper.read(self._bus, self.head.run)
        return found is not None and found.head.term > self.head.term and found.head.phase not in ENDED

    async def is_orphan(self) -> bool:
        """Return whether the broker has lost the spec of a run that had not begun. The run's name is free then."""
        spec = await with_retries(lambda: self._bus.kv_get(subjects.RUNS_BUCKET, subjects.spec_key(self.head.run)))
        return spec is None and self.head.version == 0 and self.head.phase not in ENDED

    async def notify(self, roster: Roster | None = None) -> None:
        """Publish head to the agents. A lost message does no harm: an agent also reads head every few seconds."""
        packed = encode(roster) if roster is not None else b""
        limit = min(NOTIFY_ROSTER_BYTES, content_bytes(self._bus.max_payload))
        notification = Notify(head=_encoded(self.head), roster=packed if len(packed) <= limit else b"")
        try:
            await self._bus.publish(subjects.notify(self.head.run), encode(notification))
        except BusError:
            pass

    async def _write_again(self, key: str, value: bytes, verify_durable: VerifyDurable | None) -> int:
        """Finish a write whose answer did not arrive. Return the revision. Raises Unreachable to be called again."""
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
            raise Unreachable(str(error)) from None  # the first try may have arrived just now: read head once more


def _encoded(head: Head) -> bytes:
    data = encode(head)
    assert len(data) <= MAX_HEAD_BYTES, f"head has {len(data)} bytes"
    return data
