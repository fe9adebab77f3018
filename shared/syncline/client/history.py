"""The history of a run: its commits, read from the log."""

from __future__ import annotations

from collections.abc import AsyncIterator

from syncline.bus.base import Bus
from syncline.bus.blobs import BlobGone
from syncline.bus.commits import line_of, record_in
from syncline.client.runs import head_of
from syncline.errors import ConfigError
from syncline.wire import subjects
from syncline.wire.messages import Committed, Head


async def commit_of(bus: Bus, head: Head, version: int) -> Committed:
    """Return the record of a commit under the highest term; one under a lower term was put and then not committed.

    Raises:
        ConfigError: the log does not hold the version.
    """
    run, newest = head.run, head.version
    if not newest:
        raise ConfigError("VERSION", f"{run} has committed no version yet ({head.phase})", "Ask again later")
    if version > newest or version < 1:
        why = "is the initial model, which is no merge" if version == 0 else "does not exist"
        raise ConfigError("VERSION", f"version {version} of {run} {why}", f"Use a version from 1 to {newest}")
    if (line := await line_of(bus, run, version, head.term)) is not None:
        try:
            return await record_in(bus, run, line)
        except BlobGone as error:
            problem = f"the record of version {version} of {run} is incomplete: {error}"
            raise ConfigError("VERSION", problem, "The broker lost a part of it; try another version") from None
    oldest = await bus.read(subjects.log_stream(run), 1, 1)
    kept = f"It holds versions {oldest[0].subject.split('.')[4]} to {newest}" if oldest else "It is empty"
    raise ConfigError("VERSION", f"version {version} of {run} is no longer in the log", kept)


async def commits(bus: Bus, run: str, first: int = 1, last: int | None = None) -> AsyncIterator[Committed]:
    """Yield the records of the versions `first` to `last`, in order.

    Args:
        first: at least 1.
        last: default: the newest version at the time of the call.

    Raises:
        ConfigError: no such run, or the log does not hold a version.
    """
    head = await head_of(bus, run)
    for version in range(first, (head.version if last is None else last) + 1):
        yield await commit_of(bus, head, version)
