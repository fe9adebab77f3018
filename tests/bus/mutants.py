"""Buses in memory that are each wrong in one way, and the tests of the contract that must notice it."""

from __future__ import annotations

from syncline.bus.base import Handler, Stored, Subscription
from syncline.bus.memory.bus import MemoryBroker, MemoryBus
from syncline.bus.memory.lane import ClientId, Lane, Pipe
from syncline.bus.memory.store import Store, Stream, Tenant


# -- streams -----------------------------------------------------------------------------------------------------------
class AnyRevision(Stream):
    def check_revision(self, subject: str, expected: int | None) -> None:
        pass


class Overwrites(Stream):
    def store(self, subject: str, data: bytes, time_s: float, expected: int | None = None) -> int:
        if self.shape.write_once:
            self.purge(subject)
        return super().store(subject, data, time_s, expected)


class PurgesAll(Stream):
    def purge(self, pattern: str) -> None:
        super().purge(">" if "*" in pattern else pattern)


class ReadsOneLate(Stream):
    def read(self, from_seq: int, limit: int) -> list[Stored]:
        return super().read(from_seq + 1, limit)


class GetsTheOldest(Stream):
    def last(self, subject: str) -> Stored | None:
        own = [next(iter(seqs)) for _, seqs in self.matching(subject)]
        return self.messages[max(own)] if own else None


class NeverForgets(Stream):
    def expire(self, time_s: float) -> None:
        pass


class ForgetsTheNumbers(Stream):
    def purge(self, pattern: str) -> None:
        super().purge(pattern)
        self.last_seq = max(self.messages, default=0)


class NeverFull(Stream):
    def store(self, subject: str, data: bytes, time_s: float, expected: int | None = None) -> int:
        self.bytes -= 1 << 30
        try:
            return super().store(subject, data, time_s, expected)
        finally:
            self.bytes += 1 << 30


def over(stream_type: type[Stream]) -> type[MemoryBroker]:
    return type(stream_type.__name__, (MemoryBroker,), {"stream_type": stream_type})


# -- clients and the broker --------------------------------------------------------------------------------------------
class _Forever:
    async def unsubscribe(self) -> None:
        pass


class _NeverUnsubscribes(MemoryBus):
    async def subscribe(self, subject: str, handler: Handler, *, limit: int = 4096) -> Subscription:
        await super().subscribe(subject, handler, limit=limit)
        return _Forever()


class NeverUnsubscribes(MemoryBroker):
    bus_type = _NeverUnsubscribes


class _QueuesWithoutBound(MemoryBus):
    async def subscribe(self, subject: str, handler: Handler, *, limit: int = 4096) -> Subscription:
        return await super().subscribe(subject, handler)


class QueuesWithoutBound(MemoryBroker):
    bus_type = _QueuesWithoutBound


class LetsAgentsSayAll(MemoryBroker):
    def _tenant(self, client: ClientId) -> Tenant:
        tenant = super()._tenant(client)
        tenant.requests = tenant.publishes = (">",)
        return tenant


class KeepsAgentsFromWatchers(MemoryBroker):
    def _audience(self, origin: Tenant, subject: str) -> list[Tenant]:
        return super()._audience(origin, subject) if origin is self._core else []


class LosesItsStore(MemoryBroker):
    def start(self) -> None:
        self.store = Store(self.stream_type, None)
        super().start()


class TellsNobody(MemoryBroker):
    """Whoever waits for an answer when the connection goes waits on."""

    def stop(self) -> None:
        for lane in self._lanes:
            lane._fail_all = lambda error: None  # type: ignore[method-assign]
        super().stop()


class _KeepingBus(MemoryBus):
    async def put(self, subject: str, data: bytes, *, bulk: bool = False) -> int:
        return await super().put(subject, data)


class KeepsBulkForLater(MemoryBroker):
    bus_type = _KeepingBus


class _PatientBus(MemoryBus):
    def _must_be_up(self, what: str) -> None:
        pass


class ChangesKeysLater(MemoryBroker):
    bus_type = _PatientBus


class TrustsASilentConnection(MemoryBroker):
    def _lane(self, *who: object) -> Lane:
        lane = super()._lane(*who)  # type: ignore[arg-type]
        lane._force_reconnect = lambda: None  # type: ignore[method-assign]
        return lane


class _Stack(Pipe):
    def _next(self, life: int) -> None:
        if life == self._life:
            self._calls.pop()()


class OvertakesOnAConnection(MemoryBroker):
    def _lane(self, *who: object) -> Lane:
        lane = super()._lane(*who)  # type: ignore[arg-type]
        lane._incoming = _Stack()
        return lane


MUTANTS: dict[type[MemoryBroker], str] = {
    over(AnyRevision): "test_a_key_is_changed_only_by_who_knows_its_revision",
    over(Overwrites): "test_a_write_once_subject_keeps_its_first_message",
    over(PurgesAll): "test_a_purge_removes_what_it_names_and_no_more",
    over(ReadsOneLate): "test_what_is_put_is_got_by_subject_and_read_in_order",
    over(GetsTheOldest): "test_what_is_put_is_got_by_subject_and_read_in_order",
    over(NeverForgets): "test_a_bucket_forgets_what_is_not_renewed",
    over(ForgetsTheNumbers): "test_a_purge_removes_what_it_names_and_no_more",
    over(NeverFull): "test_a_full_bucket_refuses_but_keeps_what_it_has",
    NeverUnsubscribes: "test_who_unsubscribes_hears_no_more_not_even_what_waits",
    QueuesWithoutBound: "test_when_too_many_wait_the_newest_are_dropped",
    LetsAgentsSayAll: "test_what_is_not_an_agents_own_is_denied_and_reported",
    KeepsAgentsFromWatchers: "test_watchers_hear_metrics_and_events_from_everywhere",
    LosesItsStore: "test_after_a_restart_all_that_was_acknowledged_is_there_and_all_are_back",
    TellsNobody: "test_what_waits_for_an_answer_fails_when_the_connection_goes",
    KeepsBulkForLater: "test_after_a_restart_all_that_was_acknowledged_is_there_and_all_are_back",
    ChangesKeysLater: "test_a_change_of_a_key_is_not_kept_until_the_connection_is_back",
    TrustsASilentConnection: "test_a_connection_on_which_the_broker_is_silent_begins_again",
    OvertakesOnAConnection: "test_a_message_reaches_whoever_listens_in_order",
}
