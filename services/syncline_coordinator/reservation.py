"""Space on the bus: the sizes of a run's streams, and how they are created, checked and deleted.

Every stream has a limit, which the broker reserves when the stream is created. So a run that does not fit is refused with
figures before it starts, and a run that has started does not run out of space.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from functools import partial

from syncline.bus.base import BucketConfig, Bus, StreamConfig
from syncline.bus.blobs import BlobGone, with_retries
from syncline.errors import BrokerFull, BusError, ConfigError, StreamFull, Unavailable, Unreachable
from syncline.model.manifest import Manifest
from syncline.spec.run_spec import RunSpec
from syncline.spec.sections import Async
from syncline.wire import subjects
from syncline.wire.messages import Submit

log = logging.getLogger(__name__)

UPDATES_PER_AGENT = 2  # one that waits for its verdict, one that is being sent
MESSAGE_OVERHEAD_BYTES = 512  # subject, headers, frame and the store's own record
UPDATES_SLACK_BYTES = 32 << 20  # judged updates that wait to be purged
RECORDS_BYTES = 16 << 20  # rosters and plans beside the models, and models that wait to be purged
RECORDS_AGENT_BYTES = 1024  # for each agent: its lines in a plan and a roster, each stored twice while head moves
OFFERS_BYTES = 8 << 20
OFFERS_AGENT_BYTES = 2048  # for each agent: a few offers
LOG_BYTES = 4 << 20  # records of commits that were interrupted or put twice
LOG_VERSION_BYTES = 1024  # a commit record without its updates, and its line
LOG_UPDATE_BYTES = 320  # in a commit record, for an update that was merged or dropped
LOG_REASON_BYTES = 120  # for the reason why an update was dropped
# One name for all runs, since they are checked one at a time: the next check deletes the stream that a killed one has left.
PROBE = "SYNCLINE_PROBE"
RUNS = BucketConfig(subjects.RUNS_BUCKET, 64 << 20, Submit.max_bytes)  # specs and heads of all runs
LEAST_BYTES = RUNS.max_bytes + UPDATES_SLACK_BYTES + RECORDS_BYTES + OFFERS_BYTES + LOG_BYTES  # one run of a tiny model


@dataclass(frozen=True, slots=True)
class Reservation:
    """Limits of a run's streams, in bytes."""

    updates: int
    models: int
    offers: int
    log: int

    @classmethod
    def of(cls, spec: RunSpec, manifest: Manifest, agents: int) -> Reservation:
        """Compute the limits of a run for at most so many agents."""
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
        """The bytes that all streams of the run reserve."""
        return self.updates + self.models + self.offers + self.log

    def streams(self, run: str) -> list[StreamConfig]:
        """Return the configurations of the run's streams."""
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
    """Return the largest number of agents that the run has space for.

    That is `agents.max`, or by default twice `agents.min` and at least eight more; never more than the merge rule can take.
    """
    most = spec.agents.max or max(2 * spec.agents.min, spec.agents.min + 8)
    return most if spec.merge.max_updates is None else min(most, spec.merge.max_updates)


def most_updates(spec: RunSpec, agents: int) -> int:
    """Return the largest number of updates in one version of a run with so many agents."""
    sync = spec.sync
    if isinstance(sync, Async):
        return sync.buffer_size(spec.agents.min) or agents
    if sync.sample is None:
        return agents
    quorum = 1 if sync.quorum == "all" else sync.quorum
    if max(spec.merge.min_updates(), quorum) > 1:  # if drawn agents are lost or slow, all others are asked
        return agents
    return min(agents, max(1, round(sync.sample * agents)))


def log_updates(spec: RunSpec, agents: int) -> int:
    """Return the largest number of updates that a version adds to the log.

    In a round each update is merged or dropped. In an asynchronous run as many may be dropped as are merged.
    """
    return most_updates(spec, agents) * (2 if isinstance(spec.sync, Async) else 1)


_STREAMS = (subjects.updates_stream, subjects.offers_stream, subjects.model_stream, subjects.log_stream)


def stream_names(run: str) -> tuple[str, ...]:
    """Return the names of all streams of a run."""
    return tuple(name(run) for name in _STREAMS)


async def reserve(bus: Bus, spec: RunSpec, manifest: Manifest) -> None:
    """Create the run's streams. After an error the streams created here are deleted, and existing ones stay.

    Raises:
        ConfigError: the streams do not fit, or another stream has one of their names or subjects.
        BrokerFull: the broker stores nothing now, whatever the size of the run.
    """
    agents = most_agents(spec)
    space = Reservation.of(spec, manifest, agents)
    created: list[str] = []
    try:
        for stream in space.streams(spec.name):
            await bus.ensure_stream(stream)
            created.append(stream.name)
    except (StreamFull, Unavailable) as error:
        await _best_effort(bus.delete_stream(name) for name in created)
        if isinstance(error, BrokerFull):
            raise
        if isinstance(error, Unavailable):
            hint = (
                "Choose another name for the run, or remove the stream that is in the way (`nats stream ls` lists them)"
            )
            raise ConfigError("name", f"no streams for the run {spec.name!r}: {error}", hint) from None
        raise _too_large(spec, manifest, agents, space, error) from None


def _too_large(spec: RunSpec, manifest: Manifest, agents: int, space: Reservation, error: BusError) -> ConfigError:
    """Return the refusal of a run that does not fit: the setting that needs most of the space, and the figures."""
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
    """Check that a queued run will fit once the run before it has ended. A run reserves its space when it is opened.

    Args:
        held_bytes: reserved for the run before it, and free after that run.

    Raises:
        ConfigError: the run does not fit.
    """
    agents = most_agents(spec)
    space = Reservation.of(spec, manifest, agents)
    probe = StreamConfig(PROBE, (subjects.probe(spec.name),), max(1, space.total - held_bytes))
    remove = partial(bus.delete_stream, PROBE)
    await with_retries(remove)  # the stream of a check that was killed
    try:
        await bus.ensure_stream(probe)
    except BrokerFull as error:
        raise ConfigError("store_dir", f"the broker stores nothing: {error}", error.hint) from None
    except StreamFull as error:
        raise _too_large(spec, manifest, agents, space, error) from None
    finally:
        await with_retries(remove)


async def is_log_full(bus: Bus, run: str, reserved: int) -> bool:
    """Return whether the run's log has reached its limit. If it has not, a refused write means that the broker's disk is full.

    Args:
        reserved: bytes of the log's limit.
    """
    return (await with_retries(lambda: bus.state(subjects.log_stream(run)))).bytes > reserved - LOG_BYTES // 2


async def ensure_streams(bus: Bus, spec: RunSpec, manifest: Manifest) -> None:
    """Create again the streams of an open run that the broker has lost. Streams that exist stay as they are.

    The run finds out later which messages are missing from a new stream.
    """
    for stream in Reservation.of(spec, manifest, most_agents(spec)).streams(spec.name):
        try:
            await bus.ensure_stream(stream)
        except Unavailable as error:  # another version of Syncline has created the stream with another limit
            log.debug("%s: %s", stream.name, error)


async def require_model_stream(bus: Bus, run: str) -> None:
    """Check that the stream of the run's models exists: a broker without the stream does not answer requests for a model.

    Raises:
        BlobGone: the broker has lost the stream.
    """
    try:
        await bus.state(subjects.model_stream(run))
    except Unavailable as error:
        raise BlobGone(str(error)) from None


async def release(bus: Bus, run: str, *, ended: bool = False) -> None:
    """Free the space of a run.

    Args:
        ended: keep models and log, with limits lowered to their present sizes. Else delete all streams of the run.
    """
    kept = (subjects.model_stream, subjects.log_stream)
    await _best_effort(bus.fit_stream(n(run)) if ended and n in kept else bus.delete_stream(n(run)) for n in _STREAMS)


async def _best_effort(operations: Iterator[Awaitable[None]]) -> None:
    """Await one operation after the other, and ignore errors: a stream that stays has a limit and carries the run's name."""
    for operation in operations:
        try:
            await operation
        except Unreachable:  # the broker may come back with an older store, in which the run goes on
            return
        except BusError:
            pass
