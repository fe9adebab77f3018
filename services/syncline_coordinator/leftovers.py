"""What a coordinator that was killed has left in the model stream: models put in part, records that no head names.

The stream is as large as the models that are kept and one more, and discards its oldest where it is full, which may be what
head names. So whoever takes over clears up first.
"""

from __future__ import annotations

from functools import partial

from syncline.bus.base import Bus
from syncline.bus.blobs import patiently
from syncline.wire import subjects
from syncline.wire.messages import BlobRef, Committed, Head, decode

RECORDS_A_VERSION = 4  # of versions that several coordinators put, how many are looked through


async def kept_models(bus: Bus, head: Head, keep: int) -> list[BlobRef]:
    """The models of the last `keep` versions, the oldest first, as the log and head tell."""
    stream = subjects.log_stream(head.run)
    last = (await patiently(lambda: bus.state(stream))).last_seq
    first = max(1, last - RECORDS_A_VERSION * keep + 1)
    stored = await patiently(partial(bus.read, stream, first, RECORDS_A_VERSION * keep))
    records = [decode(Committed, message.data) for message in stored]
    records.sort(key=lambda record: record.term)  # of one version the last term's was committed
    found = {r.version: r.model for r in records if head.version - keep < r.version <= head.version}
    named = {head.version - 1: head.previous, head.version: head.model}
    found |= {version: model for version, model in named.items() if model is not None}
    return [found[version] for version in sorted(found)]


async def leftovers(bus: Bus, head: Head, kept: list[BlobRef]) -> list[str]:
    """Prefixes of all chunks in the model stream that belong neither to what head names nor to a model that is kept."""
    named = [*kept, head.model, head.previous, head.manifest, head.roster, head.plan]
    ids = {ref.id for ref in named if isinstance(ref, BlobRef)}
    every = f"{subjects.PREFIX}.{head.run}.>"
    state = await patiently(lambda: bus.state(subjects.model_stream(head.run), every))
    blobs = {subject.rpartition(".")[0] for subject in state.subjects}
    return sorted(prefix for prefix in blobs if prefix.rpartition(".")[2] not in ids)
