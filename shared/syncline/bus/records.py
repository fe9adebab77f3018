"""The small blobs beside a model: manifest, rosters, plans."""

from __future__ import annotations

from functools import partial

from syncline.bus.base import Bus
from syncline.bus.blobs import get_record
from syncline.wire import subjects
from syncline.wire.messages import MAX_BLOB_RECORD_BYTES, BlobRef


async def record_of(bus: Bus, run: str, ref: BlobRef) -> bytes:
    """Raises BlobGone."""
    prefix, stream = partial(subjects.model_prefix, run), subjects.model_stream(run)
    return await get_record(bus, stream, prefix, ref, MAX_BLOB_RECORD_BYTES)
