"""What a watcher makes of a run's metrics and events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncline.observe.feed import FeedMessage, parse
from syncline.observe.run_state import BLOCKS, MAX_POINTS, Curve, RunState
from syncline.observe.telemetry import AgentEval, CenterEval, Event, Published, Round, Train


def train(**changes: object) -> Train:
    known = {"state": "training", "version": 3, "clock": 3, "step": 5, "steps": 20, "loss": 0.5, "samples_per_s": 900.0}
    return Train.model_validate({**known, "part": 0, "rows": 400, "bytes_up": 1, "bytes_down": 2, **changes})


def committed(version: int) -> Round:
    return Round(
        version=version,
        closed_by="4 of 4",
        merged=4,
        late=[],
        seconds=0.2,
        collect_s=0.1,
        merge_s=0.1,
        bytes_up=100 * version,
        bytes_down=10 * version,
    )


def tell(state: RunState, who: str, metric: Published) -> None:
    state.handle(FeedMessage(state.run, who, metric.kind, metric))


def hear(state: RunState, subject: str, data: bytes) -> None:
    """Give a raw message to the parser, and the result to the state."""
    if (message := parse(subject, data)) is not None:
        state.handle(message)


def event(state: RunState, kind: str, level: str = "info", agent: str = "", run: str = "r") -> None:
    said = Event.model_validate({"event": kind, "level": level, "text": f"{agent} {kind}", "agent": agent})
    hear(state, f"syncline.v1.{run}.events.coordinator", said.model_dump_json().encode())


def test_a_state_holds_the_newest_of_everything() -> None:
    state = RunState("r", versions=40)
    tell(state, "a1", train(step=1))
    tell(state, "a1", train(step=9))
    tell(state, "coordinator", committed(3))
    tell(state, "coordinator", CenterEval(version=2, metrics={"loss": 0.4, "accuracy": 0.9}, seconds=0.1))
    assert state.steps_of(state.agents["a1"]) == (9, 20)
    assert (state.version, state.evaluated, state.bytes_up, state.bytes_down) == (3, 2, 300, 30)
    assert state.metric_names() == ["accuracy", "loss"]
    assert not state.is_complete(3, evaluated=True)
    assert state.is_complete(3, evaluated=False)


def test_an_evaluation_that_comes_late_does_not_replace_a_newer_one() -> None:
    state = RunState("r", versions=40)
    for version in (5, 4):
        tell(state, "coordinator", CenterEval(version=version, metrics={"accuracy": version / 10}, seconds=0.1))
    assert state.metrics == {"accuracy": 0.5}
    assert state.curves["accuracy"].points == [(5, 0.5)]


def test_an_agents_own_evaluation_is_not_the_centers() -> None:
    state = RunState("r", versions=1)
    tell(state, "a1", AgentEval(version=0, clock=1, metrics={"accuracy": 0.7}))
    assert state.agents["a1"].metrics == {"accuracy": 0.7}
    assert state.metrics == {}


@pytest.mark.parametrize(
    ("what", "data"),
    [("train", b"no JSON"), ("train", b"{}"), ("round", b'{"version": "x"}'), ("unheard-of", b"{}"), ("eval", b"[]")],
)
def test_rubbish_on_the_public_feed_changes_nothing(what: str, data: bytes) -> None:
    state = RunState("r", versions=40)
    for sender in ("a1", "coordinator"):
        hear(state, f"syncline.v1.r.metrics.{sender}.{what}", data)
        hear(state, f"syncline.v1.r.events.{sender}", data)
    assert state == RunState("r", versions=40)


def test_steps_are_those_of_the_spec_until_the_agent_knows_its_own() -> None:
    state = RunState("r", versions=1, steps=800)
    tell(state, "a1", train(step=0, steps=0, state="starting"))
    assert state.steps_of(state.agents["a1"]) == (0, 0)
    tell(state, "a1", train(step=300, steps=0))
    assert state.steps_of(state.agents["a1"]) == (300, 800)
    tell(state, "a1", train(step=900, steps=0))
    assert state.steps_of(state.agents["a1"]) == (800, 800)


def test_warnings_and_errors_of_the_run_and_the_fleet_are_taken_once() -> None:
    state = RunState("r", versions=40)
    event(state, "agent-joined", agent="a1")
    event(state, "agent-lost", "warning", "a1")
    event(state, "refused", "warning", "a2", run="fleet")
    assert [e.event for e in state.take_events()] == ["agent-lost", "refused"]
    assert state.take_events() == []
    assert state.agents["a1"].lost


def test_an_agent_that_comes_back_is_not_lost() -> None:
    state = RunState("r", versions=40)
    event(state, "agent-lost", "warning", "a1")
    event(state, "agent-joined", agent="a1")
    assert not state.agents["a1"].lost


def test_an_agent_is_slow_until_it_moves_or_is_lost() -> None:
    state = RunState("r", versions=40)
    for then in ("agent-present", "agent-lost", "agent-joined"):
        event(state, "agent-slow", "warning", "a1")
        assert state.agents["a1"].slow and not state.agents["a1"].lost
        event(state, then, agent="a1")
        assert not state.agents["a1"].slow


def test_agents_that_cannot_train_are_named() -> None:
    state = RunState("r", versions=40)
    event(state, "agent-failed", "error", "a2")
    assert state.failed == {"a2": "a2 agent-failed"}


# -- curves -------------------------------------------------------------------------------------------------------------


def test_a_sparkline_goes_from_the_lowest_to_the_highest() -> None:
    curve = Curve()
    for version in range(8):
        curve.add(version, float(version))
    assert curve.sparkline(8) == BLOCKS
    assert curve.sparkline(4) == BLOCKS[1::2]
    assert curve.sparkline(0) == ""
    assert Curve().sparkline(10) == ""


def test_an_agent_speaks_in_its_own_name_and_not_without_end() -> None:
    state = RunState("r", versions=40)
    for who, text in (("a1", "the run is over"), ("a1", "a1 cannot train"), ("coordinator", "x" * 5000)):
        said = Event(event="advice", level="error", text=text)
        hear(state, f"syncline.v1.r.events.{who}", said.model_dump_json().encode())
    texts = [event.text for event in state.take_events()]
    assert texts == ["a1: the run is over", "a1 cannot train", "x" * 1000]


def test_a_constant_is_a_flat_line() -> None:
    curve = Curve()
    for version in range(3):
        curve.add(version, 0.5)
    assert curve.sparkline(6) == BLOCKS[0] * 6


def test_values_that_are_not_finite_are_gaps() -> None:
    curve = Curve()
    curve.add(1, None)
    assert curve.points == []


@given(st.lists(st.floats(-1e6, 1e6), max_size=5000), st.integers(1, 120))
def test_a_curve_is_bounded_ordered_and_always_drawable(values: list[float], width: int) -> None:
    curve = Curve()
    for version, value in enumerate(values):
        curve.add(version, value)
    versions = [version for version, _ in curve.points]
    assert len(versions) <= MAX_POINTS + 1
    assert versions == sorted(set(versions))
    assert len(curve.sparkline(width)) == (width if values else 0)
