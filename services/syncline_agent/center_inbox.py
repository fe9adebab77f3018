"""The center in the training child's inbox."""

from __future__ import annotations

from functools import partial

from syncline.bus.base import Bus
from syncline.bus.blobs import get_blob
from syncline.model.manifest import Manifest
from syncline.wire import subjects
from syncline.wire.messages import BlobRef, Head
from syncline_agent.session_status import SessionStatus
from syncline_agent.states import SessionState
from syncline_agent.training_child import Training


class CenterInbox:
    """Fetches centers into the inbox.

    Attributes:
        model: the center in the inbox; None: no usable center.
        term: under which that center was the newest.
        fresh: no period that counts has begun with it.
    """

    def __init__(self, bus: Bus, run: str, training: Training, status: SessionStatus) -> None:
        self.model: BlobRef | None = None
        self.term = 0
        self.fresh = False
        self._bus = bus
        self._run = run
        self._training = training
        self._status = status

    def forget(self) -> None:
        """Have the next period begin with a center, also if that is the same one."""
        self.model = None

    async def fetch(self, head: Head, layout: Manifest, window: int) -> None:
        """Get the center of head, unless the inbox has that one.

        Args:
            window: chunks under way at once.

        Raises:
            BlobGone: the center was purged, as head has moved on.
            BusError: the bus is out of reach.
        """
        assert head.model is not None
        if self.model != head.model:
            self._status.enter(SessionState.FETCHING)
            self.model = None  # until the new one is complete
            await get_blob(
                self._bus,
                subjects.model_stream(self._run),
                partial(subjects.model_prefix, self._run),
                head.model,
                self._training.inbox(layout.blob_bytes),
                layout.chunk_bytes,
                window=window,
                sections=layout.sections,
            )
            self.model = head.model
            self.fresh = True
            self._status.bytes_down += layout.blob_bytes
        self._status.version = head.version
        self.term = head.term
