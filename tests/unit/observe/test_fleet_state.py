"""Which runs speak, which one is looked at, and that nobody can make it grow without bound."""

from __future__ import annotations

from syncline.observe.feed import FeedMessage
from syncline.observe.fleet_state import ABSENT_STATUSES, MAX_RECENT_EVENTS, MAX_RUNS, SILENT_S, FleetState
from syncline.observe.run_state import MAX_AGENTS, TRAINING_LOSS, RunState
from syncline.observe.telemetry import QUEUED_NAMED, Event, FleetStatus, Published, Round, RunStatus, Train
from syncline.wire import subjects
from syncline_cli.ui.watching import absent

COORDINATOR = subjects.COORDINATOR
TRAIN = Train(
    state="training", version=3, clock=3, step=5, steps=20, loss=0.5, samples_per_s=9e2, part=0, rows=4, bytes_up=1,
    bytes_down=2,
)  # fmt: skip


def status(phase: str = "training", **changes: object) -> RunStatus:
    known = {"task": "t:T", "version": 3, "versions": 40, "agents": 2, "needed": 2, "lost": [], "reason": "2 of 2"}
    return RunStatus.model_validate({**known, "phase": phase, **changes})


def committed(version: int, late: list[str]) -> Round:
    return Round(
        version=version, closed_by="", merged=1, late=late, seconds=1, collect_s=1, merge_s=0, bytes_up=0, bytes_down=0
    )


def hear(fleet: FleetState, run: str, who: str, said: Published, now_s: float = 0.0) -> bool:
    event = isinstance(said, Event)
    subject = subjects.events(run, who) if event else subjects.metrics(run, who, said.kind)
    return fleet.handle(subject, said.model_dump_json().encode(), now_s) is not None


def tell(state: RunState, sender: str, said: Published, now_s: float = 0.0) -> None:
    state.handle(FeedMessage(state.run, sender, said.kind, said), now_s)


def event(kind: str, text: str = "said", agent: str = "") -> Event:
    return Event(event=kind, level="warning", text=text, agent=agent)


# -- which run ----------------------------------------------------------------------------------------------------------


def test_without_a_name_it_is_the_run_that_speaks() -> None:
    fleet = FleetState()
    assert fleet.shown(0.0) is None
    hear(fleet, "one", "a1", TRAIN)
    shown = fleet.shown(0.0)
    assert shown is not None and shown.run == "one"


def test_the_run_that_is_looked_at_stays_while_it_goes_on_and_gives_way_when_it_is_over() -> None:
    fleet = FleetState()
    hear(fleet, "one", COORDINATOR, status())
    assert fleet.shown(0.0) is fleet.runs["one"]
    hear(fleet, "two", COORDINATOR, status(), 1.0)
    assert fleet.shown(1.0) is fleet.runs["one"]
    assert fleet.active(1.0) == ["one", "two"]
    hear(fleet, "one", COORDINATOR, status("done"), 2.0)
    assert fleet.shown(2.0) is fleet.runs["two"]


def test_a_run_that_has_ended_is_looked_at_until_another_speaks() -> None:
    fleet = FleetState()
    hear(fleet, "one", COORDINATOR, status("done", reason="40 versions"))
    assert fleet.shown(99.0) is fleet.runs["one"], "it was over before it was ever looked at"
    hear(fleet, "two", COORDINATOR, status())
    assert fleet.shown(0.0) is fleet.runs["two"]
    assert fleet.shown(SILENT_S + 1) is fleet.runs["two"], "silent, but there is no other"
    hear(fleet, "three", "a1", TRAIN, SILENT_S + 2)
    assert fleet.shown(SILENT_S + 2) is fleet.runs["three"]


def test_a_wanted_run_is_the_only_one_and_others_help_with_its_name() -> None:
    fleet = FleetState("digits-1")
    hear(fleet, "digits-2", "a1", TRAIN)
    assert fleet.shown(0.0) is None
    assert fleet.suggestion() == "did you mean digits-2?"
    fleet.selected = "x"
    assert fleet.suggestion() == "active now: digits-2"


def test_the_fleet_says_what_the_coordinator_has_to_do() -> None:
    fleet = FleetState()
    hear(fleet, "fleet", COORDINATOR, FleetStatus(agents=3, run="", queued=[]))
    assert fleet.status is not None and fleet.status.agents == 3
    hear(fleet, "fleet", "a1", FleetStatus(agents=0, run="evil", queued=[]))
    assert fleet.status.run == ""
    assert "fleet" not in fleet.runs


def test_a_run_that_the_coordinator_does_not_know_of_is_absent_once_that_is_sure() -> None:
    fleet = FleetState("one")
    other = FleetStatus(agents=3, run="two", queued=["three"])
    for _ in range(ABSENT_STATUSES - 1):
        hear(fleet, "fleet", COORDINATOR, other)
    found = [fleet.absent]
    hear(fleet, "fleet", COORDINATOR, other)
    found.append(fleet.absent)
    assert found == [False, True], "a coordinator that has just started may know of it in a moment"
    hear(fleet, "fleet", COORDINATOR, FleetStatus(agents=3, run="two", queued=["one"]))
    assert not fleet.absent
    for _ in range(ABSENT_STATUSES):
        hear(fleet, "fleet", COORDINATOR, FleetStatus(agents=3, run="", queued=[f"q{i}" for i in range(QUEUED_NAMED)]))
    assert not fleet.absent, "it may be in the rest of the queue"
    for _ in range(ABSENT_STATUSES):
        hear(fleet, "fleet", COORDINATOR, other)
    hear(fleet, "one", COORDINATOR, status("done"))
    assert not fleet.absent, "its end was heard"


def test_a_name_that_is_none_is_answered_with_what_is_running_and_what_may_have_been_meant() -> None:
    fleet = FleetState("digits-2")
    hear(fleet, "fleet", COORDINATOR, FleetStatus(agents=3, run="digits-1", queued=["other"]))
    assert str(absent(fleet, " --connect nats://hub:4222")) == (
        "RUN: no run digits-2 is running or queued; running: digits-1; queued: other. Did you mean digits-1? "
        "With the coordinator's key, `syncline ls --connect nats://hub:4222` lists runs that have ended"
    )


def test_events_of_the_run_and_of_the_fleet_are_kept_the_newest() -> None:
    fleet = FleetState("one")
    for i in range(2 * MAX_RECENT_EVENTS):
        hear(fleet, "one", COORDINATOR, event("agent-joined", str(i), "a1"))
    hear(fleet, "two", COORDINATOR, event("agent-joined"))
    hear(fleet, "fleet", COORDINATOR, event("refused", "a1 was refused"))
    assert len(fleet.recent) == MAX_RECENT_EVENTS
    assert [said.event.text for said in fleet.recent][-2:] == [str(2 * MAX_RECENT_EVENTS - 1), "a1 was refused"]


# -- rubbish and bounds -------------------------------------------------------------------------------------------------


def test_rubbish_is_not_heard_and_changes_nothing() -> None:
    fleet = FleetState()
    for subject in ("", "syncline.v1.r", "syncline.v1.R.metrics.a1.train", "syncline.v1.*.metrics.a1.train", "x.y.z"):
        assert fleet.handle(subject, b"{}", 0.0) is None
    assert fleet.handle(subjects.events("fleet", "a1"), b"no JSON", 0.0) is None
    assert fleet == FleetState()


def test_of_more_runs_than_are_remembered_the_longest_silent_go_and_never_the_wanted_one() -> None:
    fleet = FleetState("run-0")
    for i in range(3 * MAX_RUNS):
        hear(fleet, f"run-{i}", "a1", TRAIN, float(i))
    assert len(fleet.runs) == len(fleet.heard_at_s) == MAX_RUNS
    assert {"run-0", f"run-{3 * MAX_RUNS - 1}"} <= set(fleet.runs)


def test_made_up_agents_are_not_remembered_without_end() -> None:
    state = RunState("r", 1)
    for i in range(MAX_AGENTS + 50):
        state.handle(FeedMessage("r", f"a{i}", TRAIN.kind, TRAIN))
    state.handle(FeedMessage("r", "No Name", TRAIN.kind, TRAIN))
    assert len(state.agents) == MAX_AGENTS


# -- whom to believe ----------------------------------------------------------------------------------------------------


def test_what_only_the_coordinator_can_know_is_not_believed_of_an_agent() -> None:
    fleet = FleetState()
    hear(fleet, "r", "a1", TRAIN)
    hear(fleet, "r", "a1", committed(99, ["a2"]))
    hear(fleet, "r", "a1", status("failed"))
    hear(fleet, "r", "a1", event("run-failed"))
    hear(fleet, "r", "a1", event("agent-lost", "a2 lost", "a2"))
    state = fleet.runs["r"]
    assert (state.version, state.phase, state.ended, state.status) == (0, "", "", None)
    assert list(state.agents) == ["a1"]


def test_an_agent_may_say_of_itself_that_it_cannot_train() -> None:
    fleet = FleetState()
    hear(fleet, "r", "a1", event("agent-failed", "a1 cannot train: no data", "a1"))
    assert fleet.runs["r"].agents["a1"].failed == "a1 cannot train: no data"


# -- what is known late -------------------------------------------------------------------------------------------------


def test_who_listens_late_learns_from_the_status_what_was_missed() -> None:
    state = RunState("r", 0)
    tell(state, COORDINATOR, status(lost=["a3"]))
    assert (state.version, state.versions, state.phase) == (3, 40, "training")
    assert state.agents["a3"].lost == "a3 lost"
    tell(state, COORDINATOR, status())
    assert not state.agents["a3"].lost


def test_a_reason_that_was_heard_is_kept_while_the_agent_is_lost() -> None:
    fleet = FleetState()
    hear(fleet, "r", COORDINATOR, event("agent-lost", "a3 lost: not heard of for 10.2 s", "a3"))
    hear(fleet, "r", COORDINATOR, status(lost=["a3"]))
    assert fleet.runs["r"].agents["a3"].lost == "a3 lost: not heard of for 10.2 s"


def test_the_end_is_learnt_from_the_status_or_from_the_event() -> None:
    for said in (status("done", reason="40 versions"), event("run-done", "run r: 40 versions")):
        fleet = FleetState("r")
        hear(fleet, "r", COORDINATOR, said)
        assert (fleet.runs["r"].phase, fleet.runs["r"].ended) == ("done", "run r: 40 versions")


# -- agents -------------------------------------------------------------------------------------------------------------


def test_lag_is_how_far_the_center_has_moved_on() -> None:
    state = RunState("r", 0)
    for name, version in (("a1", 3), ("a2", 1), ("a3", 7)):
        train = TRAIN.model_copy(update={"version": version})
        tell(state, name, train, 5.0)
    tell(state, COORDINATOR, status(version=4))
    assert [state.lag(state.agents[name]) for name in ("a1", "a2", "a3")] == [1, 3, 0]
    assert state.agents["a1"].seen_s == 5.0


def test_rounds_count_who_was_late_and_draw_the_mean_training_loss_of_those_who_are_here() -> None:
    state = RunState("r", 0)
    for name, loss in (("a1", 0.4), ("a2", 0.8), ("a3", 9.0)):
        tell(state, name, TRAIN.model_copy(update={"loss": loss}))
    tell(state, COORDINATOR, event("agent-lost", "gone", "a3"))
    for version in (1, 2):
        tell(state, COORDINATOR, committed(version, ["a2"]), float(version))
    assert (state.agents["a2"].late_rounds, state.agents["a2"].late_at_s) == (2, 2.0)
    assert [round(value, 6) for _, value in state.curves[TRAINING_LOSS].points] == [0.6, 0.6]


def test_a_coordinator_without_agents_is_a_key_that_hears_none() -> None:
    fleet = FleetState()
    for _ in range(3):
        assert not (fleet.runs and fleet.runs["r"].deaf)
        hear(fleet, "r", COORDINATOR, status())
    assert fleet.runs["r"].deaf
    hear(fleet, "r", "a1", TRAIN)
    assert not fleet.runs["r"].deaf
