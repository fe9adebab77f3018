"""The record of everything that was on the bus in one run: heads, offers, chunks, purges and losses.

The invariants are checked against this record. It is built from bus messages alone and never reads the memory of a service. It
can be rolled back as a broker can.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from syncline.bus.base import Stored
from syncline.bus.memory.store import Store
from syncline.spec.run_spec import RunSpec
from syncline.wire import subjects
from syncline.wire.messages import BlobRef, Committed, Head, LogLine, Offer, Plan, Roster, decode
from syncline_sim.observer import Observer, content, record_of
from syncline_sim.reference_merge import Vector

RESTORED = (  # the fields that follow from head
    "heads",
    "merged",
    "committed",
    "writers",
    "dropped",
    "levels",
    "taken",
    "roster",
    "plan",
    "state_vectors",
)


@dataclass
class ObservedRun:
    """The messages of one run and look-ups in them."""

    spec: RunSpec
    problems: list[str] = field(default_factory=list)
    heads: list[Head] = field(default_factory=list)
    offers: dict[tuple[str, int], list[Offer]] = field(default_factory=dict)
    offer_seqs: dict[int, tuple[str, int]] = field(default_factory=dict)  # sequence number of an offer → (agent, clock)
    merged: dict[tuple[str, int], int] = field(default_factory=dict)  # (agent, clock) → version
    lines: dict[tuple[int, int], LogLine] = field(default_factory=dict)  # (version, term)
    committed: dict[int, int] = field(default_factory=dict)  # version → the term that committed it
    chunks: dict[str, bytes] = field(default_factory=dict)  # subject → frame, of every chunk ever put
    gone: set[str] = field(default_factory=set)  # subjects that were purged
    lost: set[str] = field(
        default_factory=set
    )  # subjects that were lost because the broker came back with an older store
    incomplete: bool = False
    seen: dict[str, tuple[int, tuple[int, int]]] = field(
        default_factory=dict
    )  # session → epoch, highest (term, version)
    has_rolled_back: bool = False  # the broker has lost acknowledged writes
    answered_s: dict[str, float] = field(default_factory=dict)  # agent → a lower bound of the last heartbeat's arrival
    resubmitted: bool = False  # the run was lost as a whole and submitted again
    writers: dict[int, str] = field(default_factory=dict)  # term → the connection that writes head under it
    dropped: set[tuple[str, int]] = field(default_factory=set)  # (agent, clock)
    sessions: dict[str, set[str]] = field(default_factory=dict)  # agent → its sessions that have offered
    levels: dict[str, int] = field(default_factory=dict)  # participant → clock + offset in the last roster
    clock_bounds: dict[str, int] = field(default_factory=dict)  # agent → the highest clock after which the gate is open
    taken: dict[tuple[str, int], Vector] = field(default_factory=dict)  # (agent, clock) → merged elastic difference
    roster: Roster | None = None  # of the newest head
    plan: Plan | None = None  # the newest plan
    state_vectors: list[Vector] = field(
        default_factory=list
    )  # kept by the rule and the outer optimiser; of the newest center

    @property
    def head(self) -> Head | None:
        return self.heads[-1] if self.heads else None

    # -- recording -----------------------------------------------------------------------------------------------------
    def copy(self) -> Self:
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        copies: dict[str, Any] = {
            name: copy(value) for name, value in held.items() if isinstance(value, dict | list | set)
        }
        return replace(self, **copies)

    def on_rolled_back(self, then: Observer, store: Store) -> None:
        """Go back to the state of `then`, with the chunks and offers of the store.

        `seen` stays: agents remember the versions that they have seen.
        """
        assert isinstance(then, ObservedRun)
        again = then.copy()
        for name in (
            "heads",
            "merged",
            "committed",
            "writers",
            "dropped",
            "levels",
            "taken",
            "roster",
            "plan",
            "state_vectors",
        ):
            setattr(self, name, getattr(again, name))
        run, kept = self.spec.name, set[str]()
        for stream in (subjects.updates_stream(run), subjects.model_stream(run), subjects.log_stream(run)):
            kept |= store.streams[stream].by_subject.keys() if stream in store.streams else set()
        self.gone -= kept
        self.lost = self.chunks.keys() - kept - self.gone
        self.offers, self.offer_seqs, self.sessions = {}, {}, {}
        if subjects.offers_stream(run) in store.streams:
            for message in store.streams[subjects.offers_stream(run)].messages.values():
                self._note_offer(message)
        self.incomplete = self.head is not None and any(self._misses(ref) for _, ref in self._named(self.head))
        self.has_rolled_back = True
        self.resubmitted = self.resubmitted or self.head is None

    def _note_offer(self, message: Stored) -> tuple[str, Offer]:
        agent, offer = subjects.agent_of(message.subject), decode(Offer, message.data)
        if self.head is not None and offer.epoch == self.head.epoch and offer.base <= self.head.version:
            self.offers.setdefault((agent, offer.clock), []).append(offer)
            # An offer up to offers_seq was lost with its stream alone; the coordinator learns about it from the agents.
            if message.seq > self.head.offers_seq:
                self.offer_seqs[message.seq] = (agent, offer.clock)
            self.sessions.setdefault(agent, set()).add(offer.session)
        return agent, offer

    # -- look-ups ------------------------------------------------------------------------------------------------------
    def _judged(self, agent: str) -> int:
        """Return the agent's last judged clock according to head's roster."""
        number = self.roster.number(agent) if self.roster is not None else None
        return self.roster.clocks[number] if self.roster is not None and number is not None else 0

    def _named(self, head: Head) -> list[tuple[str, BlobRef]]:
        """Return the blobs that a head refers to, with their roles."""
        refs = [("model", head.model), ("manifest", head.manifest), ("roster", head.roster)]
        plan = [("plan", head.plan)] if isinstance(head.plan, BlobRef) else []
        return [(what, ref) for what, ref in (*refs, *plan) if ref is not None]

    def _misses(self, ref: BlobRef) -> bool:
        """Return whether a chunk of the blob, or of the state vectors of the current model, is missing on the bus."""
        blobs = [(subjects.model_prefix, ref)]
        if self.spec.state_vectors and self.head is not None and self.head.version and ref == self.head.model:
            blobs.append((subjects.outer_prefix, self._outer(ref)))
        names = [f"{prefix(self.spec.name, blob.id)}.{k}" for prefix, blob in blobs for k in range(blob.chunks)]
        return any(name not in self.chunks or name in self.gone or name in self.lost for name in names)

    def _outer(self, model: BlobRef) -> BlobRef:
        states, sections = self.spec.state_vectors, self.spec.local.sections
        return BlobRef(id=model.id, size=states * model.size // sections, chunks=states * model.chunks // sections)

    def _content(self, what: str, ref: BlobRef) -> bytes:
        return content(f"{subjects.PREFIX}.{self.spec.name}.{what}.{ref.id}", ref, self.chunks)

    def _commit_record(self, version: int, term: int) -> Committed | None:
        """Return the record of a commit as a reader of the log finds it now; None if its line or a chunk is missing."""
        run, line = self.spec.name, self.lines.get((version, term))
        if line is None:
            return None
        names, held = [subjects.log_record(run, version, term)], line.record
        if isinstance(held, BlobRef):
            names += [f"{subjects.log_blob(run, version, term, held.id)}.{k}" for k in range(held.chunks)]
        if any(name not in self.chunks or name in self.gone or name in self.lost for name in names):
            return None
        return record_of(run, line, self.chunks)

    def _record(self, kind: type[Any], ref: BlobRef) -> Any:
        return decode(kind, self._content("model", ref))
