"""The contract of the feed parser: every published record is read back as itself, and nothing else is believed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncline.observe.feed import EVENT, MAX_MESSAGE_BYTES, MAX_TEXT_CHARS, FeedMessage, parse
from syncline.observe.fleet_state import FleetState
from syncline.observe.telemetry import (
    METRICS,
    AgentEval,
    CenterEval,
    Event,
    FleetStatus,
    Published,
    Round,
    RunStatus,
    Telemetry,
    Train,
)
from syncline.wire import subjects
from syncline.wire.subjects import COORDINATOR, FLEET

EXAMPLES: dict[type[Published], Published] = {
    Train: Train(
        state="training", version=3, clock=3, step=5, steps=20, loss=0.5, samples_per_s=1e3, part=0, rows=449,
        bytes_up=1, bytes_down=2,
    ),
    AgentEval: AgentEval(version=3, clock=4, metrics={"accuracy": 0.9, "loss": None}),
    Round: Round(
        version=4, closed_by="4 of 4", merged=4, late=["a2"], seconds=0.2, collect_s=0.1, merge_s=0.05, bytes_up=1,
        bytes_down=2,
    ),
    CenterEval: CenterEval(version=4, metrics={"accuracy": 0.9}, seconds=0.1),
    RunStatus: RunStatus(
        task="t:T", phase="training", version=4, versions=40, agents=3, needed=4, lost=["a4"], reason="3 of 3"
    ),
    FleetStatus: FleetStatus(agents=4, run="r", queued=["s"]),
}  # fmt: skip
EVENT_EXAMPLE = Event(event="agent-lost", level="warning", text="a1 lost", agent="a1")


def sent(published: Published) -> bytes:
    return published.model_dump_json().encode()


class Recorder:
    """A bus that keeps what is published."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes]] = []

    async def publish(self, subject: str, data: bytes) -> None:
        self.messages.append((subject, data))


# -- the contract: every published record --------------------------------------------------------------------------------
@pytest.mark.parametrize(("sender", "model"), METRICS, ids=lambda value: str(getattr(value, "__name__", value)))
async def test_every_metric_that_is_published_is_parsed_as_itself(sender: str, model: type[Published]) -> None:
    bus = Recorder()
    run = FLEET if model is FleetStatus else "r"
    name = sender.replace("<agent>", "a1")
    await Telemetry(bus, run, name).metric(EXAMPLES[model])  # type: ignore[arg-type]
    assert parse(*bus.messages[0]) == FeedMessage(run, name, model.kind, EXAMPLES[model])


@pytest.mark.parametrize("run", ["r", FLEET])
@pytest.mark.parametrize("sender", ["a1", COORDINATOR, "broker"])
async def test_every_event_that_is_published_is_parsed(run: str, sender: str) -> None:
    bus = Recorder()
    await Telemetry(bus, run, sender).event("agent-lost", f"{sender} said", level="warning", agent="a1")  # type: ignore[arg-type]
    message = parse(*bus.messages[0])
    assert message is not None and message.event is not None
    assert (message.run, message.sender, message.kind) == (run, sender, EVENT)
    assert (message.event.event, message.event.level, message.event.text) == ("agent-lost", "warning", f"{sender} said")


# -- whom to believe -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("run", "sender", "model"),
    [
        ("r", "a1", Round),
        ("r", "a1", RunStatus),
        ("r", COORDINATOR, Train),
        (FLEET, "a1", FleetStatus),
        ("r", COORDINATOR, FleetStatus),
        (FLEET, COORDINATOR, RunStatus),
    ],
)
def test_a_kind_that_is_not_the_senders_has_no_content(run: str, sender: str, model: type[Published]) -> None:
    message = parse(subjects.metrics(run, sender, model.kind), sent(EXAMPLES[model]))
    assert message == FeedMessage(run, sender, model.kind, None)


def test_the_evaluation_of_an_agent_and_of_the_center_differ_by_their_sender() -> None:
    center = parse(subjects.metrics("r", COORDINATOR, "eval"), sent(EXAMPLES[CenterEval]))
    agent = parse(subjects.metrics("r", "a1", "eval"), sent(EXAMPLES[AgentEval]))
    assert center is not None and isinstance(center.content, CenterEval)
    assert agent is not None and isinstance(agent.content, AgentEval)


def test_a_kind_of_a_newer_version_is_passed_on_without_content() -> None:
    assert parse("syncline.v1.r.metrics.a1.newer", b"\x00") == FeedMessage("r", "a1", "newer", None)


def test_an_event_names_its_sender_and_has_a_bounded_text() -> None:
    long = EVENT_EXAMPLE.model_copy(update={"text": "x" * 1900})
    for sender, start in (("a1", "a1: x"), (COORDINATOR, "x")):
        message = parse(subjects.events("r", sender), sent(long))
        assert message is not None and message.event is not None
        assert message.event.text.startswith(start) and len(message.event.text) == MAX_TEXT_CHARS


# -- invalid messages ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "subject",
    ["", "x.y.z", "syncline.v1.r", "syncline.v1.R.metrics.a1.train", "syncline.v1.r.metrics.*.train",
     "syncline.v1.r.metrics.a1", "syncline.v1.r.metrics.a1.train.more", "syncline.v1.r.events.a1.more",
     "syncline.v1.r.model.a1.train", "syncline.v2.r.metrics.a1.train"],
)  # fmt: skip
def test_another_subject_is_no_message(subject: str) -> None:
    assert parse(subject, sent(EXAMPLES[Train])) is None


@pytest.mark.parametrize("data", [b"", b"no JSON", b"{}", b"[]", b'{"version": "x"}', b"\xff\xfe"])
@pytest.mark.parametrize(("sender", "kind"), [("a1", "train"), ("a1", "eval"), (COORDINATOR, "round"), ("a1", EVENT)])
def test_invalid_content_is_no_message(sender: str, kind: str, data: bytes) -> None:
    subject = subjects.events("r", sender) if kind == EVENT else subjects.metrics("r", sender, kind)
    assert parse(subject, data) is None


def test_a_message_beyond_the_limit_is_no_message() -> None:
    fields = json.loads(sent(EXAMPLES[Train]))
    data = json.dumps(fields).encode().ljust(MAX_MESSAGE_BYTES)
    assert parse("syncline.v1.r.metrics.a1.train", data) is not None
    assert parse("syncline.v1.r.metrics.a1.train", data + b" ") is None


@given(st.text(max_size=60), st.binary(max_size=200))
def test_no_bytes_raise_and_only_messages_change_a_state(tail: str, data: bytes) -> None:
    fleet = FleetState()
    for subject in (tail, f"syncline.v1.{tail}", f"syncline.v1.r.metrics.{tail}", f"syncline.v1.r.events.{tail}"):
        if fleet.handle(subject, data, 0.0) is None:
            assert fleet == FleetState()
        fleet = FleetState()
