"""The server's half of the bus in memory: permissions, delivery to subscribers, and storing in streams. Private to the package.

Messages are routed as nats-server 2.15 does with Syncline's accounts. A publish or subscribe that the permissions forbid is
refused and recorded. Requests of agents are mapped into the account CORE and answered once. Metrics and events reach the
watchers. A message on a stream's subject takes a separate way into the stream. This module knows neither the bus port nor the
faults that a test injects.
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

EPOCH_S = 1.7e9  # the time of day at event loop time 0, seconds since the Unix epoch
OPEN_REPLIES = 4096  # requests of agents that may wait for an answer from CORE; beyond, the oldest get no answer


class Router:
    """A server without the controls that a test needs; `MemoryBroker` adds those."""

    def __init__(self, network: Network, store: Store, clock: Callable[[], float] | None, max_payload: int) -> None:
        """Make a server without connections. `clock`: as in `MemoryBroker`."""
        self.network = network
        self.store = store
        self.max_payload = max_payload
        self.violations: list[Violation] = []
        self.hooks = Hooks()
        self._clock = clock
        self._storing: dict[str, Pipe] = {}  # stream → the messages on their way into the stream
        self._core = Tenant("CORE", "")
        self._tenants: dict[str, Tenant] = {"CORE": self._core}
        self._lanes: dict[Lane, None] = {}
        # reply subject in CORE → account and reply subject of the agent
        self._replies: dict[str, tuple[Tenant, str]] = {}
        self._lane_numbers = itertools.count(1)
        self._reply_numbers = itertools.count(1)

    def now(self) -> float:
        """Return the time of day in seconds since the Unix epoch."""
        return self._clock() if self._clock else EPOCH_S + asyncio.get_running_loop().time()

    # -- connections -----------------------------------------------------------------------------------------------
    def _lane(self, client: ClientId, inbox: str) -> Lane:
        """Return a new connection of a client."""
        lane = Lane(self, client, f"_INBOX.{inbox or client.identity}.{next(self._lane_numbers)}")
        self._lanes[lane] = None
        return lane

    def add_interest(self, interest: Interest) -> None:
        """Add a subscription, or refuse it."""
        tenant = self._tenant(interest.lane.client)
        if tenant.may_subscribe(interest.pattern):
            tenant.interests.add(interest)
        else:
            self.violations.append(Violation(interest.lane.client.identity, "subscribe", interest.pattern))
            interest.lane.refuse("subscribe", interest.pattern)

    def remove_interest(self, interest: Interest) -> None:
        """Remove a subscription."""
        self._tenant(interest.lane.client).interests.remove(interest)

    def forget(self, lane: Lane) -> None:
        """Remove the subscriptions of a connection that is lost or closed."""
        self._tenant(lane.client).interests.remove_all(lane)
        if lane.closed:
            self._lanes.pop(lane, None)

    def arrive(self, lane: Lane, message: Message) -> None:
        """Handle a message that has arrived from a client: refuse, route or answer it."""
        tenant = self._tenant(lane.client)
        if not tenant.may_publish(message.subject):
            self.violations.append(Violation(lane.client.identity, "publish", message.subject))
            lane.refuse("publish", message.subject)
        elif message.ask is None:
            self._route(tenant, message)
        else:
            self._answer(tenant, message, message.ask)

    def _tenant(self, client: ClientId) -> Tenant:
        """Return the account of a client."""
        name = f"FLEET-{client.identity}" if client.account == "FLEET" else client.account
        if name not in self._tenants:
            self._tenants[name] = Tenant(client.account, client.identity)
        return self._tenants[name]

    # -- routing ---------------------------------------------------------------------------------------------------
    def _answer(self, tenant: Tenant, message: Message, ask: Callable[[], object]) -> None:
        """Perform a request to the JetStream API and send its result."""
        try:
            result = ask()
        except BusError as error:
            result = error
        self.hooks.tell(message.operation, "done")
        self._route(tenant, Message(message.reply, result=result))

    def _route(self, tenant: Tenant, message: Message) -> None:
        """Deliver a message to all subscribers, those of other accounts included, and to the stream of its subject."""
        if tenant is self._core and message.subject in self._replies:
            tenant, reply = self._replies.pop(message.subject)
            message = replace(message, subject=reply)
        receivers = self._deliver(tenant, message)
        for other in self._audience(tenant, message.subject):
            receivers += self._deliver(other, message)
        if tenant.goes_to_core(message.subject):
            message = message.answered_to(self._mapped(tenant, message.reply))
            tenant = self._core
            receivers += self._deliver(tenant, message)
        stream = self.store.taking(message.subject) if tenant is self._core else None
        if stream is not None:
            delay_s = self.network.delay(BROKER, stream.name, "store", message.size_bytes)
            if delay_s is not None:
                self._storing.setdefault(stream.name, Pipe()).send(
                    delay_s, partial(self._store_message, stream, message)
                )
            return
        self.hooks.tell(message.operation, "done")
        if not receivers and message.reply:
            self._route(
                tenant, Message(message.reply, result=NoResponders(f"{message.subject}: the subject has no subscriber"))
            )

    def _audience(self, origin: Tenant, subject: str) -> list[Tenant]:
        """Return the other accounts that import a subject from the account `origin`."""
        if origin is self._core and matches(NOTIFY, subject):
            return [tenant for tenant in self._tenants.values() if tenant.account == "FLEET"]
        if origin.account != "WATCH" and any(matches(feed, subject) for feed in FEEDS):
            return [tenant for tenant in self._tenants.values() if tenant.account == "WATCH"]
        return []

    def _deliver(self, tenant: Tenant, message: Message) -> int:
        """Deliver a message within one account and return the number of its receivers."""
        interests = tenant.interests.of(message.subject)
        for interest in interests:
            interest.lane.deliver(interest, message)
        return len(interests)

    def _mapped(self, requester: Tenant, reply: str) -> str:
        """Return a reply subject in CORE for an agent's request; one answer to this subject reaches the agent."""
        if not reply:
            return ""
        if len(self._replies) >= OPEN_REPLIES:
            del self._replies[next(iter(self._replies))]
        mapped = f"_R_.{next(self._reply_numbers)}"
        self._replies[mapped] = requester, reply
        return mapped

    def _store_message(self, stream: Stream, message: Message) -> None:
        """Store a message and send the acknowledgement or the error."""
        now = self.now()
        stream.expire(now)
        result: int | BusError
        try:
            result = stream.store(message.subject, message.data, now, message.expected)
            answer: dict[str, object] = {"stream": stream.name, "seq": result}
        except BusError as error:
            result = error
            answer = {"stream": stream.name, "error": {"description": str(error)}}
        self.hooks.tell(message.operation, "done")
        if message.reply:
            self._route(self._core, Message(message.reply, json.dumps(answer).encode(), result=result))

    # -- streams ---------------------------------------------------------------------------------------------------
    def stream(self, name: str, missing: type[BusError]) -> Stream:
        """Return a stream without its expired messages.

        Args:
            name: name of the stream.
            missing: the error if the stream does not exist. A direct get has no responder then, while the JetStream API answers
                that the stream is missing.
        """
        found = self.store.streams.get(name)
        if found is None:
            raise missing(f"{name}: stream not found")
        found.expire(self.now())
        return found

    def delete(self, name: str) -> None:
        """Delete a stream, if it exists, with the messages on their way into it."""
        self.store.streams.pop(name, None)
        if name in self._storing:
            self._storing.pop(name).cut()
