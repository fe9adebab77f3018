"""The feed parser: a subject and its JSON become one typed metric or event.

Every reader of the public feeds (`syncline run`, `watch`, `demo`, `sim`, the Python client) uses this parser, so that all of
them believe and bound the same things. Pure: no bus, no terminal, no clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from syncline.observe.telemetry import METRICS, Event, FleetStatus, Published
from syncline.wire.subjects import COORDINATOR, FLEET, NAME, PREFIX

EVENT = "event"  # the kind of every event message; metrics have kinds of their own
MAX_MESSAGE_BYTES = 64 << 10  # a larger message is ignored; ours stay below 16 KiB
MAX_TEXT_CHARS = 1000  # of an event: the text goes to the terminal

# The kinds that each sender may publish. An agent that publishes a coordinator's kind is not believed: the broker binds
# the sender's name to its key, but not the kind.
_OF_FLEET: dict[str, type[Published]] = {FleetStatus.kind: FleetStatus}
_OF_AGENT = {model.kind: model for sender, model in METRICS if sender != COORDINATOR}
_OF_COORDINATOR = {model.kind: model for sender, model in METRICS if sender == COORDINATOR and model is not FleetStatus}


@dataclass(frozen=True, slots=True)
class FeedMessage:
    """One parsed message of the public feeds."""

    run: str  # `fleet` for a message that concerns no single run
    sender: str  # an agent's name, `coordinator` or `broker`; the broker guarantees it
    kind: str  # of a metric; EVENT for an event
    content: Published | None  # None: a kind that this version does not know, or does not accept from this sender

    @property
    def event(self) -> Event | None:
        """The event, or None for a metric."""
        return self.content if isinstance(self.content, Event) else None


def parse(subject: str, data: bytes) -> FeedMessage | None:
    """Parse one message of the public feeds.

    Args:
        subject: `syncline.v1.<run>.metrics.<sender>.<kind>` or `syncline.v1.<run>.events.<sender>`.
        data: JSON, at most MAX_MESSAGE_BYTES.

    Returns:
        The message, or None for another subject, an invalid name, and content that fails validation.
    """
    model: type[Published] | None
    match subject.removeprefix(f"{PREFIX}.").split("."):
        case [run, "metrics", sender, kind]:
            model = _metric(run, sender, kind)
        case [run, "events", sender]:
            kind, model = EVENT, Event
        case _:
            return None
    if not NAME.fullmatch(run) or not NAME.fullmatch(sender) or len(data) > MAX_MESSAGE_BYTES:
        return None
    if model is None:
        return FeedMessage(run, sender, kind, None)
    try:
        content = model.model_validate_json(data)
    except ValidationError:
        return None
    return FeedMessage(run, sender, kind, _attributed(content, sender) if isinstance(content, Event) else content)


def _metric(run: str, sender: str, kind: str) -> type[Published] | None:
    """Return the record of a kind that this sender may publish."""
    if run == FLEET:
        return _OF_FLEET.get(kind) if sender == COORDINATOR else None
    return (_OF_COORDINATOR if sender == COORDINATOR else _OF_AGENT).get(kind)


def _attributed(event: Event, sender: str) -> Event:
    """Return the event with a bounded text that starts with its sender, unless the coordinator sent it."""
    text = event.text if sender == COORDINATOR or event.text.startswith(sender) else f"{sender}: {event.text}"
    return Event(
        time_s=event.time_s, event=event.event, level=event.level, text=text[:MAX_TEXT_CHARS], agent=event.agent
    )
