"""Control records: the messages between services, as msgpack maps of frozen pydantic models.

Every record carries `t` (its type) and `v` (its major version). Unknown fields are ignored, so that a newer minor
version may add some; another type or a newer major version is refused with a clear error. Decoders have hard limits on
every length.

The type tag matters for safety: an attacker who chooses the reply subject of a request can make the broker deliver a
genuine record of one type to a reader of another type. The tag turns that record into a refused one.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import msgpack
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from syncline.errors import PeerError
from syncline.wire.allow_list import MAX_PATTERN_CHARS, MAX_PATTERNS

VERSION = 1
DIGEST_BYTES = 32  # BLAKE3 of the content of an update
RAW = "raw"  # the codec of a blob whose chunks hold its content as it is
MAX_RECORD_BYTES = 1 << 20
MAX_BLOB_RECORD_BYTES = 64 << 20  # of records that grow with agents or tensors, and therefore travel as blobs
MAX_HEAD_BYTES = 4096
PLAN_INLINE_BYTES = 1024  # a plan up to this size travels inside head; a larger one as a blob that head names
LOG_INLINE_BYTES = 32 * 1024  # a commit record up to this size travels inside its line of the log
HEAD_REASON_BYTES = 2000  # of UTF-8: with the largest value in every other field too, head stays below its limit

Name = Annotated[str, Field(max_length=63, pattern=r"^[a-z0-9-]+$")]
BlobId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Digest = Annotated[str, Field(pattern=r"^([0-9a-f]{32})?$")]
ContentDigest = Annotated[bytes, Field(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
CodecName = Annotated[str, Field(max_length=20, pattern=r"^[a-z0-9_]+$")]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Text = Annotated[str, Field(max_length=2000)]


def clipped(text: str, most_bytes: int = HEAD_REASON_BYTES) -> str:
    """Return the longest start of the text that fits into so many bytes of UTF-8."""
    return text.encode(errors="replace")[:most_bytes].decode(errors="ignore")


class Record(BaseModel):
    """Base of everything that travels as a map. Subclasses with a `kind` are whole messages, others are parts of them."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)
    kind: ClassVar[str] = ""
    max_bytes: ClassVar[int] = MAX_RECORD_BYTES

    def changed(self, **fields: Any) -> Self:
        """Return a copy with other values of these fields, validated as a whole. Raises ValidationError."""
        return type(self).model_validate({**dict(self), **fields})


class BlobRef(Record):
    """An immutable byte object: `chunks` frames under a random 128-bit id."""

    id: BlobId
    size: Count = Field(description="bytes of all its chunks, as its codec has made them")
    chunks: Annotated[int, Field(ge=1, le=1 << 24)]
    codec: CodecName = Field(RAW, description="how tensor elements became its bytes; records are `raw`")


class Hello(Record):
    """An agent introduces itself, and claims the one live session of its id. Repeated until the agent is given a run."""

    kind: ClassVar[str] = "hello"
    max_bytes: ClassVar[int] = 32 * 1024
    session: BlobId = Field(description="random id of this process life")
    public_key: Annotated[str, Field(max_length=64)] = Field("", description="nkey that signs this agent's offers")
    tasks: list[Annotated[str, Field(max_length=MAX_PATTERN_CHARS)]] = Field(
        default_factory=list, max_length=MAX_PATTERNS, description="patterns of the tasks this agent allows"
    )
    device: Annotated[str, Field(max_length=200)] = ""
    version: Annotated[str, Field(max_length=40)] = Field("", description="Syncline's version")


class Welcome(Record):
    """The coordinator's answer to a hello or a heartbeat."""

    kind: ClassVar[str] = "welcome"
    max_bytes: ClassVar[int] = 16 * 1024
    run: Annotated[str, Field(max_length=63)] = Field("", description="the run to take part in; empty: wait")
    superseded: bool = Field(False, description="another process claimed this id later: exit")
    unknown: bool = Field(False, description="the coordinator does not know this session: say hello again")
    reason: Text = ""


class Heartbeat(Record):
    """A sign of life, and of progress, during a run."""

    kind: ClassVar[str] = "heartbeat"
    max_bytes: ClassVar[int] = 16 * 1024
    session: BlobId = Field(description="as in the hello")
    clock: Count = Field(description="local periods finished")
    progress: Count = Field(description="training steps since the process started; constant while training hangs")
    state: Literal["fetching", "training", "sending", "waiting", "starting", "failed", "leaving"] = "waiting"
    reason: Text = Field("", description="why training failed")
    seen_term: Annotated[int, Field(ge=0, lt=1 << 62)] = Field(
        0, description="term of the newest head that the agent knows"
    )
    seen_version: Count = Field(0, description="… and its version")
    seen_round: Count = Field(0, description="… and its round")
    seen_epoch: Count = Field(0, description="… and its epoch")
    handed: Count = Field(0, description="clock of the newest offer that the bus has acknowledged in that epoch")


class Offer(Record):
    """The small signed record with which an agent offers a complete update for judgement."""

    kind: ClassVar[str] = "offer"
    max_bytes: ClassVar[int] = 16 * 1024
    session: BlobId = Field(description="the agent's process life")
    clock: Annotated[int, Field(ge=1, lt=1 << 63)] = Field(description="local periods finished with this one")
    base: Count = Field(description="version of the center that the update deviates from")
    term: Count = Field(description="term under which that version was read")
    epoch: Count = Field(0, description="epoch of the head that named it")
    samples: Count = Field(description="rows of the agent's part")
    steps: Count = Field(description="local steps in the update")
    seconds: Annotated[float, Field(ge=0, le=1e9)] = Field(0.0, description="that the period took")
    blob: BlobRef = Field(description="the update's chunks")
    digest: ContentDigest = Field(description="BLAKE3 over the BLAKE3 digests of the update's chunks, in their order")
    signature: Annotated[bytes, Field(max_length=64)] = Field(
        b"",
        description="by the agent's nkey, over msgpack of [`offer`, run, agent, the other fields]: a map with its keys "
        "sorted, in which a field that has its default is left out; the same for the blob inside",
    )

    def signed_bytes(self, run: str, agent: str) -> bytes:
        """Return the bytes that the agent signs: the run, the agent's name, and every field but the signature.

        A field that has its default is left out, so that a later minor version can add fields: offers without them have
        the same signature before and after.
        """
        fields = self.model_dump(exclude={"signature"}, exclude_defaults=True)
        return _pack([self.kind, run, agent, _sorted(fields)])


class PlanEntry(Record):
    """One update in a merge."""

    agent: Name
    clock: Count = Field(description="as in its offer, like all that is not explained here")
    lag: Count = Field(0, description="versions between the base of the update and the version that it is merged into")
    weight: float = Field(description="its share; weights need not sum to 1")
    blob: BlobRef
    digest: ContentDigest
    samples: Count = 0
    steps: Count = 0
    seconds: float = 0.0


class Plan(Record):
    """The content of the next merge, decided before the merge starts. Every later coordinator executes exactly this
    plan.
    """

    kind: ClassVar[str] = "plan"
    max_bytes: ClassVar[int] = MAX_BLOB_RECORD_BYTES
    version: Count = Field(description="version the merge will make")
    reason: Text = Field(description="why the round was closed")
    merged: Annotated[list[PlanEntry], Field(max_length=100_000)] = Field(description="in the order of agents' names")
    late: Annotated[list[Name], Field(max_length=100_000)] = Field(
        default_factory=list, description="participants that were not waited for"
    )


class Verdict(IntEnum):
    """The outcome of an agent's last judged update. The words of the reason are in the events and the commit record."""

    NONE = 0
    MERGED = 1
    LATE = 2
    BROKEN = 3


class Presence(IntEnum):
    """Whether an agent can be counted on. `AWAY` and `QUARANTINED` are reserved: no coordinator writes them yet."""

    LOST = 0  # no heartbeat, or it said that it leaves or cannot train
    PRESENT = 1
    SLOW = 2  # heartbeats without progress: not waited for, and its finished work is still judged
    AWAY = 3
    QUARANTINED = 4


class Roster(Record):
    """The agents of a run, numbered for good: the list only grows. Columns, so that an agent costs little beside its name.

    A flag byte holds: bit 0 participant of the round that this roster opens, bits 1 to 3 the verdict on the last judged clock,
    bits 4 to 6 whether the first, second and third clock before that one were merged. A presence byte holds 0 lost, 1 present,
    2 slow, 3 away or 4 quarantined; the last two are reserved.
    """

    kind: ClassVar[str] = "roster"
    max_bytes: ClassVar[int] = MAX_BLOB_RECORD_BYTES
    parts: Annotated[int, Field(ge=1, lt=1 << 63)] = Field(
        description="parts of the data; agent number i trains on part i"
    )
    agents: Annotated[list[Name], Field(max_length=100_000)] = Field(description="names by number")
    clocks: Annotated[list[Count], Field(max_length=100_000)] = Field(description="last judged clock of each")
    flags: Annotated[bytes, Field(max_length=100_000)] = Field(description="participant and verdicts of each")
    presence: Annotated[bytes, Field(max_length=100_000)] = Field(description="present, slow or lost, of each")
    offsets: Annotated[list[Count], Field(max_length=100_000)] = Field(
        default_factory=list,
        description="added to the clock of each for the comparison with the gate; empty: all 0",
    )

    @model_validator(mode="after")
    def _same_length(self) -> Roster:
        columns = (self.clocks, self.flags, self.presence, self.offsets or self.flags)
        if any(len(column) != len(self.agents) for column in columns):
            raise ValueError("agents, clocks, flags, presence and offsets differ in length")
        for flag in set(self.flags):
            if flag >> 1 & 7 > max(Verdict) or flag >> 7:
                raise ValueError(f"flags hold {flag:#04x}, with an unknown verdict or bit")
        if (most := max(self.presence, default=0)) > max(Presence):
            raise ValueError(f"presence holds {most}, and the largest state is {max(Presence):d}")
        return self

    def number(self, agent: str) -> int | None:
        """Return the agent's number, or None for an unknown agent."""
        return self.agents.index(agent) if agent in self.agents else None

    def state(self, number: int) -> Presence:
        """Return the presence of an agent, by its number."""
        return Presence(self.presence[number])

    def participant(self, number: int) -> bool:
        """Return whether the agent takes part in the round that this roster opens."""
        return bool(self.flags[number] & 1)

    def verdict(self, number: int) -> Verdict:
        """Return the verdict on the agent's last judged clock."""
        return Verdict(self.flags[number] >> 1 & 7)

    def merged_before(self, number: int) -> int:
        """Return which of the clocks before the last judged one were merged: bit 0 for the clock just before, bit 1 for
        the next older.
        """
        return self.flags[number] >> 4

    def offset(self, number: int) -> int:
        """Return the number that is added to the agent's clock for the comparison with the gate."""
        return self.offsets[number] if self.offsets else 0

    @staticmethod
    def flag(participant: bool, verdict: Verdict, merged_before: int = 0) -> int:
        """Return the flag byte of an agent."""
        return participant | verdict << 1 | merged_before << 4


REMEMBERED = 3  # clocks before the last judged one, of which a roster says whether they were merged

Phase = Literal["waiting", "training", "merging", "done", "failed"]
ENDED: frozenset[str] = frozenset({"done", "failed"})


class Head(Record):
    """The one small record that says which version is current. Changed by compare-and-set alone; under 4 KB always."""

    kind: ClassVar[str] = "head"
    max_bytes: ClassVar[int] = MAX_HEAD_BYTES
    run: Name
    term: Annotated[int, Field(ge=1, lt=1 << 63)] = Field(description="fencing number of the coordinator in charge")
    version: Count = Field(description="commits so far")
    round: Count = Field(0, description="rounds opened so far, those that were opened again included")
    epoch: Count = Field(
        0,
        description="random id of the run's history: a new one starts after the broker loses acknowledged writes, and offers "
        "of an older one are dropped",
    )
    phase: Phase = Field(description="`done` and `failed` are ends")
    digest: Digest = Field("", description="xxh3-128 over the center's bytes")
    model: BlobRef | None = Field(None, description="the center")
    previous: BlobRef | None = Field(None, description="the model one version back")
    manifest: BlobRef | None = Field(None, description="the layout of the center")
    roster: BlobRef | None = Field(None, description="the participants of the round, and the verdicts")
    plan: Annotated[bytes, Field(max_length=PLAN_INLINE_BYTES)] | BlobRef | None = Field(
        None, description="the merge under way: a Plan record, or the blob that holds it"
    )
    gate: Count | None = Field(
        None, description="asynchronous runs: a period may begin while the agent's clock and offset are not above this"
    )
    offers_seq: Count = Field(0, description="offers up to this sequence number were judged by this version")
    reason: Annotated[str, Field(max_length=HEAD_REASON_BYTES), PlainSerializer(clipped)] = Field(
        "", description="why the last round was closed, or the run ended; cut off at the limit"
    )


class Notify(Record):
    """«Head has moved»: sent after every change, as a hint. An agent that misses the hint reads head again in a few
    seconds.
    """

    kind: ClassVar[str] = "notify"
    head: Annotated[bytes, Field(max_length=MAX_HEAD_BYTES)] = Field(description="a head record")
    roster: Annotated[bytes, Field(max_length=64 * 1024)] = Field(b"", description="the roster, if it is small enough")


class Submit(Record):
    """A run spec for the coordinator's queue."""

    kind: ClassVar[str] = "submit"
    max_bytes: ClassVar[int] = 256 * 1024
    spec: dict[str, Any] = Field(description="every setting with its value, in sections as in the YAML file")
    defaults: list[Annotated[str, Field(max_length=500)]] = Field(
        default_factory=list,
        max_length=1000,
        description="settings that the user did not write, as `local.steps`: a reader ignores unknown ones",
    )


class Submitted(Record):
    """The answer: accepted, refused with a hint, or not known yet."""

    kind: ClassVar[str] = "submitted"
    run: Annotated[str, Field(max_length=63)] = Field(
        "", description="the run's name; empty if the run was not accepted"
    )
    doing: Annotated[str, Field(max_length=300)] = Field(
        "",
        description="not empty: the answer is not known yet, because the coordinator does this; ask again with the same record",
    )
    setting: Text = Field("", description="the setting that is wrong")
    problem: Text = Field("", description="the problem, with the value")
    hint: Text = Field("", description="the remedy")
    warnings: list[Text] = Field(default_factory=list, max_length=100)


class Stop(Record):
    """Ends a run: at once, or with the merge that is under way. A repeated request changes nothing."""

    kind: ClassVar[str] = "stop"
    max_bytes: ClassVar[int] = 16 * 1024
    run: Name
    by: Annotated[str, Field(max_length=200)] = Field("", description="the person who asks, for the run's reason")


class Stopped(Record):
    """The answer: the outcome for the run."""

    kind: ClassVar[str] = "stopped"
    run: Name
    outcome: Literal["stopping", "stopped", "ended", "unknown"] = Field(
        description="`stopping`: the run ends in a moment; `stopped`: the run never begins; `ended`: the run had ended "
        "before; `unknown`: there is no such run"
    )
    reason: Text = Field("", description="why the run ended")


class Story(Record):
    """Asks for the recent decisions that concern an agent, while its run goes on."""

    kind: ClassVar[str] = "story"
    max_bytes: ClassVar[int] = 16 * 1024
    run: Name
    agent: Name


class StoryTold(Record):
    """The answer: facts and decisions that concern the agent, one on each line, the oldest first."""

    kind: ClassVar[str] = "story-told"
    run: Name
    known: bool = Field(description="false: this coordinator does not drive the run now")
    lines: list[Text] = Field(default_factory=list, max_length=200)


class Dropped(Record):
    """An update that was judged and not merged."""

    agent: Name
    clock: Count
    reason: Text


class Committed(Record):
    """The commit record: everything that `why` and a replay need to know about one version."""

    kind: ClassVar[str] = "committed"
    max_bytes: ClassVar[int] = MAX_BLOB_RECORD_BYTES
    run: Name
    term: Count
    version: Count
    digest: Digest
    model: BlobRef = Field(description="this version; on the bus as long as the run keeps it")
    plan: Plan = Field(description="the merged updates, and why the round was closed")
    dropped: Annotated[list[Dropped], Field(max_length=100_000)] = Field(
        default_factory=list, description="updates judged since the version before and not merged"
    )
    dropped_more: Count = Field(0, description="… and how many more were, which are not listed")
    norms: Annotated[list[float], Field(max_length=100_000)] = Field(
        default_factory=list, description="the length of each update, in the plan's order"
    )
    norm: float = Field(0.0, description="the length of D, which was made of them")
    bytes_up: Count = Field(description="update bytes got for this version")
    bytes_down: Count = Field(description="model bytes put for it")
    phases_s: dict[str, float] = Field(description="seconds: collect, merge")


class LogLine(Record):
    """A line of the log of commits. Its subject names version and term as well."""

    kind: ClassVar[str] = "log-line"
    version: Count
    term: Count
    model: BlobRef = Field(description="this version; on the bus as long as the run keeps it")
    record: Annotated[bytes, Field(max_length=LOG_INLINE_BYTES)] | BlobRef = Field(
        description="the Committed record, or the blob with this record, whose chunks lie under the line's subject"
    )


MESSAGES: tuple[type[Record], ...] = (
    Hello,
    Welcome,
    Heartbeat,
    Offer,
    Plan,
    Roster,
    Head,
    Notify,
    Submit,
    Submitted,
    Stop,
    Stopped,
    Story,
    StoryTold,
    Committed,
    LogLine,
)

R = TypeVar("R", bound=Record)


def encode(record: Record) -> bytes:
    """Return the record as a message."""
    assert record.kind, f"{type(record).__name__} is a part, not a message"
    return _pack({"t": record.kind, "v": VERSION, **record.model_dump()})


def decode(model: type[R], data: bytes, *, limit: int | None = None) -> R:
    """Return the record in a message.

    Args:
        model: the class of the record that is expected.
        data: the message.
        limit: bytes that the message may have; None: the limit of the class.

    Raises:
        PeerError: the message is no such record. Names the field.
    """
    what, limit = model.kind, model.max_bytes if limit is None else limit
    if len(data) > limit:
        raise PeerError(f"{what}: {len(data)} bytes are more than the {limit} allowed")
    try:
        fields = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=64 * 1024,
            max_bin_len=limit,
            max_array_len=100_000,
            max_map_len=1_000,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as error:  # msgpack's own errors derive from either
        raise PeerError(f"{what}: not msgpack: {str(error) or type(error).__name__}") from None
    if not isinstance(fields, dict):
        raise PeerError(f"{what}: a {type(fields).__name__}, not a map")
    if fields.get("t") != what:
        raise PeerError(f"{what}: a record of type {shown(fields.get('t'))}")
    if fields.get("v") != VERSION:
        raise PeerError(f"{what}: version {shown(fields.get('v'))}, this Syncline reads version {VERSION}")
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise PeerError(": ".join((what, *filter(None, [".".join(map(str, first["loc"]))]), first["msg"]))) from None


def shown(value: Any) -> str:
    """Return a peer's value for the text of an error: short, and safe for values nested too deeply for `repr`."""
    return repr(value)[:40] if isinstance(value, str | int | float | bytes | None) else f"a {type(value).__name__}"


def _sorted(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the map with its keys in order, and the maps inside likewise, so that one content has one encoding."""
    return {k: _sorted(v) if isinstance(v, dict) else v for k, v in sorted(fields.items())}


def _pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed
