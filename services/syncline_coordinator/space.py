"""Space on the bus is reserved, not hoped for: a run's streams are bounded, and sized so that what it needs fits."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass

from syncline.bus.base import BucketConfig, Bus, StreamConfig
from syncline.bus.blobs import BlobGone
from syncline.errors import BusError, ConfigError, StreamFull, Unavailable, Unreachable
from syncline.spec import RunSpec
from syncline.wire import subjects
from syncline.wire.manifest import Manifest
from syncline.wire.messages import Submit

log = logging.getLogger(__name__)

UPDATES_PER_AGENT = 2  # one that is judged, one on its way
MESSAGE_OVERHEAD_BYTES = 512  # subject, headers, frame and the store's own record
UPDATES_SLACK_BYTES = 32 << 20  # judged updates that wait to be purged
RECORDS_BYTES = 16 << 20  # rosters and plans beside the models, and models that wait to be purged
OFFERS_BYTES = 8 << 20
LOG_BYTES = 32 << 20
RUNS = BucketConfig(subjects.RUNS_BUCKET, 64 << 20, Submit.max_bytes)  # specs and heads of all runs
LEAST_BYTES = RUNS.max_bytes + UPDATES_SLACK_BYTES + RECORDS_BYTES + OFFERS_BYTES + LOG_BYTES  # one run of a tiny model


@dataclass(frozen=True, slots=True)
class Reservation:
    """Bytes that the run's streams may hold."""

    updates: int
    models: int

    @classmethod
    def of(cls, spec: RunSpec, manifest: Manifest, agents: int) -> Reservation:
        vector = manifest.nbytes + manifest.chunks * MESSAGE_OVERHEAD_BYTES
        updates = UPDATES_PER_AGENT * agents * manifest.sections * vector + UPDATES_SLACK_BYTES
        return cls(updates, (spec.keep_models + 1) * (manifest.sections + spec.states) * vector + RECORDS_BYTES)

    @property
    def total(self) -> int:
        return self.updates + self.models + OFFERS_BYTES + LOG_BYTES

    def streams(self, run: str) -> list[StreamConfig]:
        prefix = f"{subjects.PREFIX}.{run}"
        return [
            StreamConfig(subjects.updates_stream(run), (subjects.every_update(run),), self.updates, write_once=True),
            StreamConfig(subjects.offers_stream(run), (f"{prefix}.agent.*.offer",), OFFERS_BYTES, max_per_subject=1000),
            StreamConfig(
                subjects.model_stream(run), (f"{prefix}.model.>", f"{prefix}.outer.>"), self.models, write_once=True
            ),
            StreamConfig(subjects.log_stream(run), (f"{prefix}.log.>",), LOG_BYTES),
        ]


def most_agents(spec: RunSpec) -> int:
    """The largest fleet that the run has room for: `agents.max`, or twice what it starts with and eight at least."""
    most = spec.agents.max or max(2 * spec.agents.min, spec.agents.min + 8)
    return most if spec.merge.most is None else min(most, spec.merge.most)


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
            mend = (
                "Choose another name for the run, or remove the stream that is in the way (`nats stream ls` lists them)"
            )
            raise ConfigError("name", f"no streams for the run {spec.name!r}: {error}", mend) from None
        why = f"merge.rule is {spec.merge.rule} and outer.kind is {spec.outer.kind}"
        kept = f" of {manifest.sections + spec.states} vectors, because {why}" if spec.states else ""
        raise ConfigError(
            "agents.max",
            f"the run needs {space.total >> 20} MiB on the bus ({UPDATES_PER_AGENT} updates of {manifest.blob_bytes >> 10} KiB "
            f"for each of {agents} agents, {spec.keep_models + 1} models{kept}), and the broker says: {error}",
            "Lower agents.max or keep_models, or give the broker's JetStream more room (max_file_store; with "
            "`--local`: a larger disk for TMPDIR)",
        ) from None


async def restore(bus: Bus, spec: RunSpec, manifest: Manifest) -> None:
    """Makes those of the run's streams again that the broker has lost, so that what was in them is missed; what is there stays
    as it is."""
    for stream in Reservation.of(spec, manifest, most_agents(spec)).streams(spec.name):
        try:
            await bus.ensure_stream(stream)
        except Unavailable as error:  # it was made by another version, and is of another size
            log.debug("%s: %s", stream.name, error)


async def insist_on_models(bus: Bus, run: str) -> None:
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
