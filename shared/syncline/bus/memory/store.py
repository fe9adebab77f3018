"""The state of the broker in memory: streams, and the subscriptions of each account. Private to the package; knows no clock.

Limits, sequence numbers and sizes equal those of a nats-server with a file store, byte for byte, so the same messages fit into
both. The accounts have the permissions that `syncline.bus.server.accounts` configures; the contract suite compares the two.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

from syncline.bus.base import READ_BYTES, BucketConfig, Stored, StreamConfig, StreamState, checked_subject
from syncline.bus.memory.lane import Interest, Lane
from syncline.bus.server.accounts import Account
from syncline.errors import AlreadyPut, Conflict, StreamFull, Unavailable
from syncline.wire.subjects import PREFIX, RUNS_BUCKET

CAS_HEADER_BYTES = len("NATS/1.0\r\nNats-Expected-Last-Subject-Sequence: 01234567890123456789\r\n\r\n")
NOTIFY = f"{PREFIX}.*.notify"
FEEDS = (f"{PREFIX}.*.metrics.>", f"{PREFIX}.*.events.*")  # subjects that watchers receive
QUESTIONS = (  # JetStream requests of an agent that CORE answers
    f"$JS.API.DIRECT.GET.*.{PREFIX}.*.model.>",
    f"$JS.API.DIRECT.GET.KV_{RUNS_BUCKET}.$KV.{RUNS_BUCKET}.>",
)
SHORTEST_TTL_S = 0.1  # JetStream accepts no shorter one


# -- subjects ----------------------------------------------------------------------------------------------------------
@lru_cache(maxsize=1 << 15)  # a fleet uses the same few subjects again and again
def matches(pattern: str, subject: str) -> bool:
    """Return whether a subject matches a pattern.

    `*` stands for one token, `>` for one or more tokens at the end. A wildcard in the *subject* is an ordinary token.
    """
    wanted, tokens = pattern.split("."), subject.split(".")
    if "" in tokens:
        return False
    if wanted[-1] == ">":
        wanted.pop()
        if len(tokens) <= len(wanted):
            return False
    elif len(tokens) != len(wanted):
        return False
    return all(w in ("*", t) for w, t in zip(wanted, tokens, strict=False))


def collide(a: str, b: str) -> bool:
    """Return whether some subject matches both patterns."""
    left, right = a.split("."), b.split(".")
    for x, y in zip(left, right, strict=False):
        if ">" in (x, y):
            return True
        if x != y and "*" not in (x, y):
            return False
    return len(left) == len(right)


def checked(subject: str, *, pattern: bool = False) -> str:
    """Return the subject if the broker accepts it. Raises Unavailable, for a misplaced wildcard only if `pattern` is true."""
    tokens = subject.split(".")
    bad = any(not t or (t not in ("*", ">") and ("*" in t or ">" in t)) for t in tokens) or ">" in tokens[:-1]
    if pattern and bad:
        raise Unavailable(f"{subject!r} is not a valid subject")
    return checked_subject(subject)


# -- streams -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Shape:
    """The configuration of a stream. A bucket is a stream with one message per key."""

    subjects: tuple[str, ...]
    max_bytes: int
    max_per_subject: int  # -1: no limit
    refuse: bool  # whether a full stream refuses messages instead of dropping its oldest
    write_once: bool = False
    max_value_bytes: int = -1  # -1: no limit
    ttl_s: float = 0.0  # 0: messages do not expire

    @classmethod
    def of(cls, config: StreamConfig | BucketConfig) -> Shape:
        """Return the configuration of the stream that holds a stream or a bucket."""
        if isinstance(config, BucketConfig):
            subjects = (f"$KV.{config.name}.>",)
            value = config.max_value_bytes
            return cls(subjects, config.max_bytes, 1, refuse=True, max_value_bytes=value, ttl_s=config.ttl_s)
        once = config.write_once
        per_subject = 1 if once else config.max_per_subject
        return cls(config.subjects, config.max_bytes, per_subject, once or config.full == "refuse", once)


class Stream:
    """Messages in order, found by sequence number and by subject."""

    def __init__(self, name: str, shape: Shape) -> None:
        self.name = name
        self.shape = shape
        self.messages: dict[int, Stored] = {}  # by sequence number, in order
        self.by_subject: dict[str, dict[int, int]] = {}  # subject → sequence number → bytes
        self.bytes = 0
        self.last_seq = 0

    def copy(self) -> Stream:
        """Return an independent copy."""
        other = type(self)(self.name, self.shape)
        other.messages = dict(self.messages)
        other.by_subject = {subject: dict(seqs) for subject, seqs in self.by_subject.items()}
        other.bytes, other.last_seq = self.bytes, self.last_seq
        return other

    def fit(self) -> None:
        """Lower the byte limit to the bytes held."""
        self.shape = replace(self.shape, max_bytes=max(1, self.bytes))

    def takes(self, subject: str) -> bool:
        """Return whether the stream stores this subject."""
        return any(matches(pattern, subject) for pattern in self.shape.subjects)

    def store(self, subject: str, data: bytes, time_s: float, expected: int | None = None) -> int:
        """Append a message and drop old ones as the limits demand.

        Args:
            subject: a subject of this stream.
            data: the content.
            time_s: the time of storing, seconds since the Unix epoch.
            expected: the last sequence number that the subject must have, 0 for no message; None: any.

        Returns:
            The sequence number of the message.

        Raises:
            Unavailable: the value is too large.
            Conflict: the subject has another last sequence number.
            AlreadyPut: the stream is write-once and has a message of this subject.
            StreamFull: the stream refuses messages beyond its byte limit.
        """
        shape = self.shape
        mine = self.by_subject.get(subject, {})
        if 0 <= shape.max_value_bytes < len(data):
            raise Unavailable(f"{subject}: message size exceeds maximum allowed")
        self.check_revision(subject, expected)
        size = 30 + len(subject.encode()) + len(data) + (4 + CAS_HEADER_BYTES if expected is not None else 0)
        full = 0 < shape.max_per_subject <= len(mine)
        if full and shape.write_once:
            raise AlreadyPut(f"{subject}: maximum messages per subject exceeded")
        if shape.refuse and self.bytes + size > shape.max_bytes and not (full and next(iter(mine.values())) >= size):
            raise StreamFull(f"{subject}: maximum bytes exceeded")
        self.last_seq += 1
        self.messages[self.last_seq] = Stored(subject, data, self.last_seq, time_s)
        mine = self.by_subject.setdefault(subject, mine)
        mine[self.last_seq] = size
        self.bytes += size
        if full:
            self.remove(next(iter(mine)))
        while self.bytes > shape.max_bytes:  # drops even the new message if it alone exceeds the limit
            self.remove(next(iter(self.messages)))
        return self.last_seq

    def check_revision(self, subject: str, expected: int | None) -> None:
        """Raise Conflict if a compare-and-set expects another last sequence number of the subject."""
        last = next(reversed(self.by_subject.get(subject, {0: 0})))
        if expected is not None and expected != last:
            raise Conflict(f"{subject}: wrong last sequence: {last}")

    def remove(self, seq: int) -> None:
        """Remove the message with this sequence number."""
        subject = self.messages.pop(seq).subject
        mine = self.by_subject[subject]
        self.bytes -= mine.pop(seq)
        if not mine:
            del self.by_subject[subject]

    def last(self, subject: str) -> Stored | None:
        """Return the last message whose subject matches a subject or a pattern; None if the stream has no such message."""
        own = [next(reversed(seqs)) for s, seqs in self.matching(subject)]
        return self.messages[max(own)] if own else None

    def read(self, from_seq: int, limit: int) -> list[Stored]:
        """Return messages in order, starting with `from_seq`: at most `limit`, and about `READ_BYTES`."""
        found: list[Stored] = []
        size = 0
        for seq in range(max(from_seq, self.first_seq), self.last_seq + 1):
            if len(found) >= limit or size >= READ_BYTES:
                break
            if (message := self.messages.get(seq)) is not None:
                found.append(message)
                size += self.by_subject[message.subject][seq]
        return found

    def state(self, pattern: str) -> StreamState:
        """Return the counts, with the messages per subject for the subjects that match `pattern`; empty: for no subject."""
        counts = {s: len(seqs) for s, seqs in sorted(self.matching(pattern))} if pattern else {}
        return StreamState(len(self.messages), self.bytes, self.first_seq, self.last_seq, counts)

    def purge(self, pattern: str) -> None:
        """Remove all messages whose subject matches."""
        for seq in [s for _, seqs in self.matching(pattern) for s in seqs]:
            self.remove(seq)

    def expire(self, time_s: float) -> None:
        """Remove the messages whose lifetime has ended at `time_s`, seconds since the Unix epoch."""
        while self.shape.ttl_s and self.messages:
            seq, oldest = next(iter(self.messages.items()))
            if time_s < oldest.time_s + self.shape.ttl_s:
                return
            self.remove(seq)

    def matching(self, pattern: str) -> list[tuple[str, dict[int, int]]]:
        """Return the subjects that match, each with its sequence numbers and sizes."""
        if "*" not in pattern and ">" not in pattern:
            return [(pattern, self.by_subject[pattern])] if pattern in self.by_subject else []
        if "*" not in pattern and pattern.endswith(".>"):  # every purge has this form
            return [(s, seqs) for s, seqs in self.by_subject.items() if s.startswith(pattern[:-1])]
        return [(s, seqs) for s, seqs in self.by_subject.items() if matches(pattern, s)]

    @property
    def first_seq(self) -> int:
        """The first sequence number; in a stream whose messages were all removed the next one, and 0 in a new stream."""
        return next(iter(self.messages), self.last_seq + 1 if self.last_seq else 0)


class Store:
    """All streams, and the room that they can reserve."""

    def __init__(self, stream_type: type[Stream], max_bytes: int | None) -> None:
        """Make an empty store. `max_bytes`: the sum of the byte limits of all streams; None: no limit."""
        self._stream_type = stream_type
        self._max_bytes = max_bytes
        self.streams: dict[str, Stream] = {}

    def taking(self, subject: str) -> Stream | None:
        """Return the stream that stores a subject, or None."""
        return next((stream for stream in self.streams.values() if stream.takes(subject)), None)

    def ensure(self, name: str, shape: Shape) -> None:
        """Create a stream, or verify that an existing one has this configuration.

        Raises:
            Unavailable: a stream of this name has another configuration, another stream stores one of the subjects, or
                JetStream does not accept the configuration.
            StreamFull: the byte limits of all streams would exceed the room.
        """
        existing = self.streams.get(name)
        if existing is not None:
            wanted = asdict(shape)
            actual = asdict(existing.shape)
            differ = [f"{k} is {actual[k]!r}, wanted {wanted[k]!r}" for k in wanted if actual[k] != wanted[k]]
            if differ:
                raise Unavailable(f"stream {name} exists with another configuration: {'; '.join(differ)}")
            return
        reserved = sum(stream.shape.max_bytes for stream in self.streams.values()) + shape.max_bytes
        if self._max_bytes is not None and reserved > self._max_bytes:
            raise StreamFull(f"{name}: insufficient storage resources available")
        if 0 < shape.ttl_s < SHORTEST_TTL_S:
            raise Unavailable(f"{name}: max age needs to be >= {SHORTEST_TTL_S} s")
        taken = [subject for stream in self.streams.values() for subject in stream.shape.subjects]
        for subject in shape.subjects:
            if any(collide(subject, other) for other in taken):
                raise Unavailable(f"{name}: {subject} overlaps with another subject of a stream")
            taken.append(subject)
        self.streams[name] = self._stream_type(name, shape)

    def with_newer(self, newer: Store, names: Collection[str]) -> Store:
        """Return a store with the streams of `newer`: in its state those in `names`, in the state of this store the others.

        A stream that only `newer` has, and that is not in `names`, is empty in the result.
        """
        other = Store(self._stream_type, self._max_bytes)
        for name, stream in newer.streams.items():
            older = self.streams.get(name) or type(stream)(name, stream.shape)
            other.streams[name] = (stream if name in names else older).copy()
        return other

    def copy(self) -> Store:
        """Return an independent copy."""
        other = Store(self._stream_type, self._max_bytes)
        other.streams = {name: stream.copy() for name, stream in self.streams.items()}
        return other


class InterestTable:
    """The subscriptions of one account by pattern. Fast for thousands of agents with few different patterns."""

    def __init__(self) -> None:
        self._numbers: dict[Interest, int] = {}  # the order of subscription
        self._count = 0
        self._by_pattern: dict[str, dict[Interest, None]] = {}
        self._wild: dict[str, None] = {}  # patterns with a wildcard anywhere but in the last token

    def add(self, interest: Interest) -> None:
        """Add a subscription."""
        self._count += 1
        self._numbers[interest] = self._count
        self._by_pattern.setdefault(interest.pattern, {})[interest] = None
        if {"*", ">"} & set(interest.pattern.removesuffix(".*").split(".")):
            self._wild[interest.pattern] = None

    def remove(self, interest: Interest) -> None:
        """Remove a subscription, if the table has it."""
        same = self._by_pattern.get(interest.pattern, {})
        same.pop(interest, None)
        self._numbers.pop(interest, None)
        if not same:
            self._by_pattern.pop(interest.pattern, None)
            self._wild.pop(interest.pattern, None)

    def remove_all(self, lane: Lane) -> None:
        """Remove the subscriptions of a connection."""
        for interest in [interest for interest in self._numbers if interest.lane is lane]:
            self.remove(interest)

    def of(self, subject: str) -> list[Interest]:
        """Return the subscriptions that match a subject, in the order in which they were made."""
        if "" in subject.split("."):
            return []
        found = dict.fromkeys(self._by_pattern.get(subject, ()))
        found |= self._by_pattern.get(subject.rpartition(".")[0] + ".*", {})
        for pattern in self._wild:
            if matches(pattern, subject):
                found |= self._by_pattern[pattern]
        return sorted(found, key=self._numbers.__getitem__)


class Tenant:
    """An account on the broker: the permissions of its users, its subscriptions, and the exchange across its border.

    Every agent has an account of its own, so that answers to the agent reach no other client.
    """

    def __init__(self, account: Account, identity: str) -> None:
        self.account = account
        self.interests = InterestTable()
        own = (f"{PREFIX}.*.metrics.{identity}.>", f"{PREFIX}.*.events.{identity}")
        self.requests: tuple[str, ...] = ()  # patterns of requests that CORE answers
        self.publishes: tuple[str, ...] = ()  # patterns that the users may publish
        self.subscribes: tuple[str, ...] = FEEDS  # patterns that the users may subscribe to
        if account == "FLEET":
            self.requests = (f"{PREFIX}.*.agent.{identity}.>", *QUESTIONS)
            self.publishes = (*self.requests, *own)
            self.subscribes = (f"_INBOX.{identity}.>", NOTIFY)

    def may_publish(self, subject: str) -> bool:
        """Return whether the permissions of the account allow the subject of a message."""
        return self.account == "CORE" or any(matches(pattern, subject) for pattern in self.publishes)

    def may_subscribe(self, pattern: str) -> bool:
        """Return whether the permissions of the account allow a subscription."""
        return self.account == "CORE" or any(matches(allowed, pattern) for allowed in self.subscribes)

    def goes_to_core(self, subject: str) -> bool:
        """Return whether CORE answers this subject for the account."""
        return any(matches(pattern, subject) for pattern in self.requests)
