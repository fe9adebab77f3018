"""Version 0 of a run."""

from __future__ import annotations

from functools import partial

from syncline.bus.base import Bus
from syncline.bus.blobs import put_record
from syncline.model.manifest import Manifest
from syncline.wire import subjects
from syncline.wire.messages import encode
from syncline_coordinator.head import HeadKeeper
from syncline_coordinator.lookout import taken_over
from syncline_coordinator.reducer import Reducer


async def commit_initial(
    bus: Bus, keeper: HeadKeeper, reducer: Reducer, manifest: Manifest, set_back: int | None
) -> None:
    """The model as the task makes it under the run's seed. `set_back`: as in `taken_over`."""
    merged = await reducer.put_center()
    prefix = partial(subjects.model_prefix, keeper.head.run)
    layout = await put_record(bus, prefix, encode(manifest))
    moved = {"model": merged.model, "digest": merged.digest, "manifest": layout, "roster": None, "phase": "waiting"}
    head = keeper.head if set_back is None else await taken_over(bus, keeper.head, set_back)
    await keeper.check()  # a broker that was set back gives revisions again
    await keeper.write(head.model_copy(update=moved))
