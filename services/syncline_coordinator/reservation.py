"""Space on the bus is reserved, not hoped for: a run's streams are bounded, and sized so that what it needs fits."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from functools import partial

from syncline.bus.base import BucketConfig, Bus, StreamConfig
from syncline.bus.blobs import BlobGone, with_retries
from syncline.errors import BusError, ConfigError, StreamFull, Unavailable, Unreachable
from syncline.model.manifest import Manifest
from syncline.spec.run_spec import RunSpec
from syncline.spec.sections import Async
from syncline.wire import subjects
from syncline.wire.messages import Submit

log = logging.getLogger(__name__)

UPDATES_PER_AGENT = 2  # one that is judged, one on its way
MESSAGE_OVERHEAD_BYTES = 512  # subject, headers, frame and the store's own record
UPDATES_SLACK_BYTES = 32 << 20  # judged updates that wait to be purged
RECORDS_BYTES = 16 << 20  # rosters and plans beside the models, and models that wait to be purged
RECORDS_AGENT_BYTES = 1024  # for each agent: its lines in a plan and a roster, both there twice while head moves
OFFERS_BYTES = 8 << 20
OFFERS_AGENT_BYTES = 2048  # a few offers
LOG_BYTES = 4 << 20  # records of commits that were interrupted, or put twice
LOG_VERSION_BYTES = 1024  # a commit record without its updates, and its line
LOG_UPDATE_BYTES = 320  # in a commit record, for an update that was merged, or was late and then dropped
LOG_REASON_BYTES = 120  # of the reason why one was dropped
PROBE = (
    "SYNCLINE_PROBE"  # one for all runs, as they are checked one at a time: what a killed check leaves is found again
)
RUNS = BucketConfig(subjects.RUNS_BUCKET, 64 << 20, Submit.max_bytes)  # specs and heads of all runs
LEAST_BYTES = RUNS.max_bytes + UPDATES_SLACK_BYTES + RECORDS_BYTES + OFFERS_BYTES + LOG_BYTES  # one run of a tiny model


@dataclass(frozen=True, slots=True)
class Reservation:
    """Bytes that the run's streams may hold."""

    updates: int
    models: int
    offers: int
    log: int

    @classmethod
    def of(cls, spec: RunSpec, manifest: Manifest, agents: int) -> Reservation:
        vector = manifest.nbytes + manifest.chunks * MESSAGE_OVERHEAD_BYTES
        updates = UPDATES_PER_AGENT * agents * manifest.sections * vector + UPDATES_SLACK_BYTES
        models = (spec.keep_models + 1) * (manifest.sections + spec.state_vectors) * vector
        return cls(
            updates,
            models + RECORDS_BYTES + agents * RECORDS_AGENT_BYTES,
            OFFERS_BYTES + agents * OFFERS_AGENT_BYTES,
            LOG_BYTES + spec.stop.versions * (LOG_VERSION_BYTES + log_updates(spec, agents) * LOG_UPDATE_BYTES),
        )

    @property
    def total(self) -> int:
        return self.updates + self.models + self.offers + self.log

    def streams(self, run: str) -> list[StreamConfig]:
        prefix = f"{subjects.PREFIX}.{run}"
        return [
            StreamConfig(subjects.updates_stream(run), (subjects.every_update(run),), self.updates, write_once=True),
            StreamConfig(subjects.offers_stream(run), (f"{prefix}.agent.*.offer",), self.offers, max_per_subject=1000),
            StreamConfig(
                subjects.model_stream(run), (f"{prefix}.model.>", f"{prefix}.outer.>"), self.models, write_once=True
            ),
            StreamConfig(subjects.log_stream(run), (f"{prefix}.log.>",), self.log, max_per_subject=1, full="refuse"),
        ]


def most_agents(spec: RunSpec) -> int:
    """The largest fleet that the run has room for: `agents.max`, or twice what it starts with and eight at least."""
    most = spec.agents.max or max(2 * spec.agents.min, spec.agents.min + 8)
    return most if spec.merge.max_updates is None else min(most, spec.merge.max_updates)


def most_updates(spec: RunSpec, agents: int) -> int:
    """Return how many updates a version is made of at most."""
    sync = spec.sync
    if isinstance(sync, Async):
        return sync.buffer_size(spec.agents.min) or agents
    if sync.sample is None:
        return agents
    quorum = 1 if sync.quorum == "all" else sync.quorum
    if (
        max(spec.merge.min_updates(), quorum) > 1
    ):  # where some of those drawn are lost or slow, all others are asked too
        return agents
    return min(agents, max(1, round(sync.sample * agents)))


def log_updates(spec: RunSpec, agents: int) -> int:
    """Return how many updates a version adds to the log. In a round each is merged or dropped, in an asynchronous run as
    many may be dropped beside those that are merged."""
    return most_updates(spec, agents) * (2 if isinstance(spec.sync, Async) else 1)


async def reserve(bus: Bus, spec: RunSpec, manifest: Manifest) -> None:
    """Makes the run's streams. Raises ConfigError where they do not fit, with the figures, or where something else is there
    under such a name or subject; then none that was made is left, and what was there before stays."""
    agents = most_agents(spec)
    space = Reservation.of(spec, manifest, agents)
    made: list[str] = []
    try:
        for stream in space.streams(spec.name):
            await bus.ensure_stream(stream)
            made.append(stream.name)
    except (StreamFull, Unavailable) as error:
        await _tidy(bus.delete_stream(name) for name in made)
        if isinstance(error, Unavailable):
            hint = (
                "Choose another name for the run, or remove the stream that is in the way (`nats stream ls` lists them)"
            )
            raise ConfigError("name", f"no streams for the run {spec.name!r}: {error}", hint) from None
        raise _too_large(spec, manifest, agents, space, error) from None


def _too_large(spec: RunSpec, manifest: Manifest, agents: int, space: Reservation, error: BusError) -> ConfigError:
    """Name the setting that the run's space depends on most, with the figures."""
    why = f"merge.rule is {spec.merge.rule} and outer.kind is {spec.outer.kind}"
    kept = f" of {manifest.sections + spec.state_vectors} vectors, because {why}" if spec.state_vectors else ""
    parts = {"agents.max": space.updates, "keep_models": space.models, "stop.versions": space.log}
    return ConfigError(
        max(parts, key=lambda setting: parts[setting]),
        f"the run needs {space.total >> 20} MiB on the bus ({space.updates >> 20} MiB for {UPDATES_PER_AGENT} updates of "
        f"{manifest.blob_bytes >> 10} KiB for each of {agents} agents, {space.models >> 20} MiB for {spec.keep_models + 1} "
        f"models{kept}, {space.log >> 20} MiB for the log of {spec.stop.versions} versions of up to "
        f"{log_updates(spec, agents)} updates), and the broker says: {error}",
        "Lower agents.max, keep_models or stop.versions, or give the broker's JetStream more room (max_file_store; with "
        "`--local`: a larger disk for TMPDIR)",
    )


async def check_space(bus: Bus, spec: RunSpec, manifest: Manifest, held_bytes: int) -> None:
    """Raise ConfigError where the run would not fit even if the run before it gave back all the `held_bytes` that it holds.

    Keeps nothing: a run reserves its space when it is opened.
    """
    agents = most_agents(spec)
    space = Reservation.of(spec, manifest, agents)
    probe = StreamConfig(PROBE, (subjects.probe(spec.name),), max(1, space.total - held_bytes))
    remove = partial(bus.delete_stream, PROBE)
    await with_retries(remove)  # that of a check which was killed
    try:
        await bus.ensure_stream(probe)
    except StreamFull as error:
        raise _too_large(spec, manifest, agents, space, error) from None
    finally:
        await with_retries(remove)


async def is_log_full(bus: Bus, run: str, reserved: int) -> bool:
    """Whether the log of commits holds about as much as was reserved for it. Else the broker's disk is full."""
    return (await with_retries(lambda: bus.state(subjects.log_stream(run)))).bytes > reserved - LOG_BYTES // 2


async def restore(bus: Bus, spec: RunSpec, manifest: Manifest) -> None:
    """Makes those of the run's streams again that the broker has lost, so that what was in them is missed; what is there stays
    as it is."""
    for stream in Reservation.of(spec, manifest, most_agents(spec)).streams(spec.name):
        try:
            await bus.ensure_stream(stream)
        except Unavailable as error:  # it was made by another version, and is of another size
            log.debug("%s: %s", stream.name, error)


async def require_model_stream(bus: Bus, run: str) -> None:
    """Raises BlobGone where the broker has lost the whole stream of the run's models: it answers no question about one then."""
    try:
        await bus.state(subjects.model_stream(run))
    except Unavailable as error:
        raise BlobGone(str(error)) from None


async def release(bus: Bus, run: str, *, ended: bool = False) -> None:
    """Deletes the run's streams with all they hold. Of a run that has ended, models and log stay, as large as they are."""
    kept = (subjects.model_stream, subjects.log_stream)
    names = (subjects.updates_stream, subjects.offers_stream, *kept)
    await _tidy(bus.fit_stream(n(run)) if ended and n in kept else bus.delete_stream(n(run)) for n in names)


async def _tidy(work: Iterator[Awaitable[None]]) -> None:
    """One after the other, best effort: what stays is named by the run and bounded."""
    for one in work:
        try:
            await one
        except Unreachable:  # a broker may come back with an older store, in which the run goes on
            return
        except BusError:
            pass
