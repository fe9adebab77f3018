"""The server's half of the bus in memory: permissions, delivery to subscribers, and the way into streams.
Package-private.

Messages are routed as by nats-server 2.15 with the accounts of `syncline.bus.server.accounts`: forbidden ones are
refused and noted, questions of agents are mapped into CORE and answered once, metrics and events reach the watchers,
and a message on a stream's subject goes its own way into the stream. Independent of the bus port, and of the faults
that a test causes.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from syncline.bus.memory.faults import BROKER, Hooks, Network
from syncline.bus.memory.lane import ClientId, Interest, Lane, Message, Pipe
from syncline.bus.memory.store import FEEDS, NOTIFY, Store, Stream, Tenant, matches
from syncline.bus.server.violations import Violation
from syncline.errors import BusError, NoResponders

EPOCH_S = 1.7e9  # seconds since the epoch at the event loop's time 0
OPEN_REPLIES = 4096  # questions of agents that may wait for an answer; beyond this number the oldest get none


class Router:
    """The normal work of a server. `clock`: seconds since the epoch; None for the event loop's time plus a constant."""

    def __init__(self, network: Network, store: Store, clock: Callable[[], float] | None, max_payload: int) -> None:
        self.network, self.store, self.max_payload = network, store, max_payload
        self.violations: list[Violation] = []
        self.hooks = Hooks()
        self._clock = clock
        self._storing: dict[str, Pipe] = {}  # the way of messages into each stream
        self._core = Tenant("CORE", "")
        self._tenants: dict[str, Tenant] = {"CORE": self._core}
        self._lanes: dict[Lane, None] = {}
        self._replies: dict[
            str, tuple[Tenant, str]
        ] = {}  # a reply subject in CORE → account and reply subject of the agent
        self._lane_numbers, self._reply_numbers = itertools.count(1), itertools.count(1)

    def now(self) -> float:
        return self._clock() if self._clock else EPOCH_S + asyncio.get_running_loop().time()

    # -- connections -----------------------------------------------------------------------------------------------
    def _lane(self, who: ClientId, inbox: str) -> Lane:
        lane = Lane(self, who, f"_INBOX.{inbox or who.identity}.{next(self._lane_numbers)}")
        self._lanes[lane] = None
        return lane

    def add_interest(self, interest: Interest) -> None:
        """Take a subscription, or refuse it."""
        tenant = self._tenant(interest.lane.who)
        if tenant.may_subscribe(interest.pattern):
            tenant.interests.add(interest)
        else:
            self.violations.append(Violation(interest.lane.who.identity, "subscribe", interest.pattern))
            interest.lane.refuse("subscribe", interest.pattern)

    def remove_interest(self, interest: Interest) -> None:
        self._tenant(interest.lane.who).interests.remove(interest)

    def forget(self, lane: Lane) -> None:
        self._tenant(lane.who).interests.remove_all(lane)
        if lane.closed:
            self._lanes.pop(lane, None)

    def arrive(self, lane: Lane, message: Message) -> None:
        """Take one message of a client, or refuse it."""
        tenant = self._tenant(lane.who)
        if not tenant.may_publish(message.subject):
            self.violations.append(Violation(lane.who.identity, "publish", message.subject))
            lane.refuse("publish", message.subject)
        elif message.ask is None:
            self._route(tenant, message)
        else:
            self._answer(tenant, message, message.ask)

    def _tenant(self, who: ClientId) -> Tenant:
        name = f"FLEET-{who.identity}" if who.account == "FLEET" else who.account
        if name not in self._tenants:
            self._tenants[name] = Tenant(who.account, who.identity)
        return self._tenants[name]

    # -- routing ---------------------------------------------------------------------------------------------------
    def _answer(self, tenant: Tenant, message: Message, ask: Callable[[], object]) -> None:
        try:
            result = ask()
        except BusError as error:
            result = error
        self.hooks.tell(message.operation, "done")
        self._route(tenant, Message(message.reply, result=result))

    def _route(self, tenant: Tenant, message: Message) -> None:
        """Deliver a message to its subscribers, in other accounts too, and to the stream that takes its subject."""
        if tenant is self._core and message.subject in self._replies:
            tenant, reply = self._replies.pop(message.subject)
            message = replace(message, subject=reply)
        delivered = self._deliver(tenant, message)
        for other in self._audience(tenant, message.subject):
            delivered += self._deliver(other, message)
        if tenant.goes_to_core(message.subject):
            tenant, message = self._core, message.answered_to(self._mapped(tenant, message.reply))
            delivered += self._deliver(tenant, message)
        stream = self.store.taking(message.subject) if tenant is self._core else None
        if stream is not None:
            delay_s = self.network.delay(BROKER, stream.name, "store", message.size_bytes)
            if delay_s is not None:
                self._storing.setdefault(stream.name, Pipe()).send(
                    delay_s, partial(self._store_message, stream, message)
                )
            return
        self.hooks.tell(message.operation, "done")
        if not delivered and message.reply:
            self._route(
                tenant, Message(message.reply, result=NoResponders(f"{message.subject}: the subject has no subscriber"))
            )

    def _audience(self, origin: Tenant, subject: str) -> list[Tenant]:
        """Return the other accounts that get a message."""
        if origin is self._core and matches(NOTIFY, subject):
            return [tenant for tenant in self._tenants.values() if tenant.account == "FLEET"]
        if origin.account != "WATCH" and any(matches(feed, subject) for feed in FEEDS):
            return [tenant for tenant in self._tenants.values() if tenant.account == "WATCH"]
        return []

    def _deliver(self, tenant: Tenant, message: Message) -> int:
        interests = tenant.interests.of(message.subject)
        for interest in interests:
            interest.lane.deliver(interest, message)
        return len(interests)

    def _mapped(self, asks: Tenant, reply: str) -> str:
        """Return a reply subject in CORE for the question of an agent. Only the first answer reaches the agent."""
        if not reply:
            return ""
        if len(self._replies) >= OPEN_REPLIES:
            del self._replies[next(iter(self._replies))]
        mapped = f"_R_.{next(self._reply_numbers)}"
        self._replies[mapped] = asks, reply
        return mapped

    def _store_message(self, stream: Stream, message: Message) -> None:
        now = self.now()
        stream.expire(now)
        result: int | BusError
        try:
            result = stream.store(message.subject, message.data, now, message.expected)
            said: dict[str, object] = {"stream": stream.name, "seq": result}
        except BusError as error:
            result, said = error, {"stream": stream.name, "error": {"description": str(error)}}
        self.hooks.tell(message.operation, "done")
        if message.reply:
            self._route(self._core, Message(message.reply, json.dumps(said).encode(), result=result))

    # -- streams ---------------------------------------------------------------------------------------------------
    def stream(self, name: str, missing: type[BusError]) -> Stream:
        """Return a stream as it is now.

        Args:
            missing: the error for a missing stream. A direct get meets no subscriber then; JetStream's API answers with
                an error.
        """
        found = self.store.streams.get(name)
        if found is None:
            raise missing(f"{name}: stream not found")
        found.expire(self.now())
        return found

    def delete(self, name: str) -> None:
        self.store.streams.pop(name, None)
        if name in self._storing:
            self._storing.pop(name).cut()
