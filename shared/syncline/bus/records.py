"""The small blobs in the stream of a model: manifests, rosters and plans."""

from __future__ import annotations

from functools import partial

from syncline.bus.base import Bus
from syncline.bus.blobs import get_record
from syncline.wire import subjects
from syncline.wire.messages import MAX_BLOB_RECORD_BYTES, BlobRef


async def record_of(bus: Bus, run: str, ref: BlobRef) -> bytes:
    """Return the content of a manifest, a roster or a plan.

    Raises:
        BlobGone: the blob was purged, or never put.
        PeerError: the blob is larger than `MAX_BLOB_RECORD_BYTES`, or a chunk is not valid.
    """
    prefix, stream = partial(subjects.model_prefix, run), subjects.model_stream(run)
    return await get_record(bus, stream, prefix, ref, MAX_BLOB_RECORD_BYTES)
