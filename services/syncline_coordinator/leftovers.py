"""What a coordinator that was killed has left on the bus: models put in part, and records that no head and no line names.

The model stream is as large as the models that are kept and one more, and the log as large as the records of all versions:
what is left in them would be missing later. So a coordinator that takes over clears up first.
"""

from __future__ import annotations

from functools import partial

from syncline.bus.base import Bus
from syncline.bus.blobs import patiently
from syncline.bus.commits import line_of
from syncline.wire import subjects
from syncline.wire.messages import BlobRef, Head

LOOKED_BACK = 2  # versions: a coordinator that was replaced may put a record late


async def kept_models(bus: Bus, head: Head, keep: int) -> list[BlobRef]:
    """The models of the last `keep` versions, the oldest first, as the log and head tell."""
    named = {head.version - 1: head.previous, head.version: head.model}
    found = {version: model for version, model in named.items() if model is not None}
    for version in range(max(1, head.version - keep + 1), head.version - 1):
        if (line := await line_of(bus, head.run, version, head.term)) is not None:
            found[version] = line.model
    return [found[version] for version in sorted(found)]


async def leftovers(bus: Bus, head: Head, kept: list[BlobRef]) -> list[str]:
    """Prefixes of all chunks in the model stream that belong neither to what head names nor to a model that is kept."""
    named = [*kept, head.model, head.previous, head.manifest, head.roster, head.plan]
    ids = {ref.id for ref in named if isinstance(ref, BlobRef)}
    every = f"{subjects.PREFIX}.{head.run}.>"
    state = await patiently(lambda: bus.state(subjects.model_stream(head.run), every))
    blobs = {subject.rpartition(".")[0] for subject in state.subjects}
    return sorted(prefix for prefix in blobs if prefix.rpartition(".")[2] not in ids)


async def uncommitted(bus: Bus, head: Head) -> list[str]:
    """Subjects of lines in the log, and with them of their chunks, whose commit was interrupted under an older term than
    head's: those of the next version, and those of the newest ones beside the line that counts."""
    left = []
    for version in range(max(1, head.version - LOOKED_BACK), head.version + 2):
        every = subjects.log_record(head.run, version, ">")
        state = await patiently(partial(bus.state, subjects.log_stream(head.run), every))
        tokens = [subject.split(".")[5:] for subject in state.subjects]
        lines = [int(term) for term, *chunk in tokens if not chunk and int(term) <= head.term]
        counts = max(lines, default=0) if version <= head.version else 0
        left += [(version, term) for term in {int(term) for term, *_ in tokens} if term < head.term and term != counts]
    return [subjects.log_record(head.run, version, term) for version, term in sorted(left)]
