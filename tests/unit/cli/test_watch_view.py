"""The picture fits every terminal, shows first who needs somebody to look, and says nothing that commands the terminal."""

from __future__ import annotations

import pytest
from rich.text import Text

from syncline.observe.feed import parse
from syncline.observe.fleet_state import LATE_S, SILENT_S, FleetState
from syncline.observe.run_state import AgentState
from syncline.observe.telemetry import CenterEval, Event, FleetStatus, Published, Round, RunStatus, Train
from syncline.wire import subjects
from syncline_cli.ui.watch_view import KEYS, AgentCondition, ago, picture
from syncline_cli.ui.watching import json_line, version_line

COORDINATOR = subjects.COORDINATOR
NOW_S = 100.0
SIZES = [(40, 10), (80, 24), (160, 45), (20, 3), (300, 100)]


def hear(fleet: FleetState, who: str, said: Published, run: str = "digits-1", now_s: float = NOW_S) -> None:
    event = isinstance(said, Event)
    subject = subjects.events(run, who) if event else subjects.metrics(run, who, said.kind)
    assert fleet.handle(subject, said.model_dump_json().encode(), now_s) is not None


def train(state: str = "training", **changes: object) -> Train:
    known: dict[str, object] = {"version": 13, "clock": 13, "step": 11, "steps": 20, "loss": 0.0203, "part": 0}
    sizes = {"samples_per_s": 12345.0, "rows": 449, "bytes_up": 2_700_000, "bytes_down": 1_200_000}
    return Train.model_validate({**known, **sizes, "state": state, **changes})


def going(agents: int, late: list[str] | None = None, lost: list[str] | None = None, wanted: str = "") -> FleetState:
    """A run of so many agents at version 13 of 40."""
    fleet = FleetState(wanted)
    for i in range(1, agents + 1):
        hear(fleet, f"a{i}", train())
    for version in range(1, 14):
        metrics: dict[str, float | None] = {"loss": 1 / version, "accuracy": 1 - 1 / (version + 1)}
        hear(fleet, COORDINATOR, CenterEval(version=version, metrics=metrics, seconds=0.1))
    closed = Round(
        version=13, closed_by="quorum 3 of 4 + 2.0 s", merged=3, late=late or [], seconds=2.9, collect_s=2.7, merge_s=0.1,
        bytes_up=10_800_000, bytes_down=4_800_000,
    )  # fmt: skip
    hear(fleet, COORDINATOR, closed)
    status = RunStatus(
        task="syncline.tasks.digits:Digits", phase="training", version=13, versions=40, agents=agents, needed=4,
        lost=lost or [], reason="quorum 3 of 4 + 2.0 s",
    )  # fmt: skip
    hear(fleet, COORDINATOR, status)
    return fleet


def drawn(fleet: FleetState, width: int = 80, height: int = 24, now_s: float = NOW_S) -> list[str]:
    return picture(fleet, width, height, now_s, 0.0, "nats://hub:4222").plain.split("\n")


def names(lines: list[str]) -> list[str]:
    """The agents that have a row."""
    top = next(i for i, line in enumerate(lines) if line.startswith("agent "))
    rows = lines[top + 1 :]
    return [line.split()[0] for line in rows if line.startswith("a") and line.split()[0][1:].isdigit()]


# -- it fits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("agents", [0, 1, 4, 400])
def test_a_picture_is_never_larger_than_the_terminal(width: int, height: int, agents: int) -> None:
    fleet = going(agents, late=["a1"])
    for i in range(30):
        hear(fleet, COORDINATOR, Event(event="agent-lost", level="warning", text=f"a{i} lost: {'x' * 400}", agent="a1"))
    for lines in (drawn(fleet, width, height), drawn(FleetState("digits-1"), width, height)):
        assert len(lines) == height
        assert max(map(len, lines)) <= width


def test_four_agents_are_shown_with_all_that_is_known() -> None:
    text = "\n".join(drawn(going(4)))
    for shown in (
        "run digits-1  training  syncline.tasks.digits:Digits",
        "4 agents  closed by quorum 3 of 4 + 2.0 s in 2.90 s",
        "version 13 of 40  ━",
        "49,380 rows/s  10.8 MB up, 4.8 MB down",
        "accuracy        0.929",
        "0.500 … 0.929",
        "training loss",
        "a4     training 55%       13     0    0.0203    12,345     2.7 MB     now",
    ):
        assert shown in text
    assert f"{KEYS}; the run continues" in text


def test_a_wide_terminal_shows_more() -> None:
    text = "\n".join(drawn(going(4), 160))
    for shown in ("(merge 0.10 s)", "11/20", "449", "1.2 MB", "late"):
        assert shown in text


def test_of_400_agents_those_that_need_somebody_to_look_are_shown_and_the_rest_counted() -> None:
    fleet = going(400, late=["a300"], lost=["a200"])
    hear(fleet, "a100", Event(event="agent-failed", level="error", text="a100 cannot train: no data", agent="a100"))
    lines = drawn(fleet)
    shown = names(lines)
    assert shown[:4] == ["a100", "a200", "a300", "a1"]
    assert f"… and {400 - len(shown)} more: {400 - len(shown)} training" in lines
    assert "400 agents  1 cannot train  1 lost  1 late" in lines[1]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("agents", [0, 4, 400])
def test_advice_stays_and_is_read_to_its_end_where_there_is_room(width: int, height: int, agents: int) -> None:
    fleet = going(agents)
    text = f"a2 takes 3.1 times as long as the others. {'Read on. ' * 15}Set sync.quorum"
    hear(fleet, COORDINATOR, Event(event="advice", level="warning", text=text, agent="a2"))
    for i in range(100):
        hear(fleet, COORDINATOR, Event(event="update-dropped", level="warning", text=f"a3: clock {i} dropped"))
    lines = drawn(fleet, width, height)
    assert len(lines) == height and max(map(len, lines)) <= width
    if height >= 24:
        assert any("clock 99 dropped" in line for line in lines)
        assert any("a2 takes 3.1 times" in line for line in lines)
    if height >= 24 and agents < 400:
        assert sum("Set sync.quorum" in line for line in lines) == 1, "\n".join(lines)
        assert sum("clock" in line and "dropped" in line for line in lines) >= 3


def test_only_the_coordinator_gives_advice() -> None:
    fleet = going(4)
    hear(fleet, "a1", Event(event="advice", level="warning", text="send me your keys", agent="a1"))
    assert fleet.runs["digits-1"].advice is None


def test_agents_come_before_events_and_some_events_are_always_there() -> None:
    fleet = going(400)
    for i in range(20):
        hear(fleet, COORDINATOR, Event(event="agent-joined", level="info", text=f"a{i} joined", agent=f"a{i}"))
    lines = drawn(fleet)
    assert sum(" joined" in line for line in lines) == 2
    assert "a19 joined" in lines[-2]
    few = going(2)
    few.recent.extend(fleet.recent)
    assert sum(" joined" in line for line in drawn(few)) == 7


# -- who needs somebody to look -----------------------------------------------------------------------------------------


def test_who_needs_somebody_to_look_comes_first() -> None:
    now = AgentState(train=train(), seen_s=NOW_S)
    cases = [
        (AgentState(failed="no data"), "cannot train"),
        (AgentState(train=train(), lost="gone", seen_s=NOW_S), "lost"),
        (AgentState(train=train(), slow="no progress", seen_s=NOW_S), "slow"),
        (AgentState(train=train(), seen_s=NOW_S - SILENT_S - 1), "silent"),
        (AgentState(train=train(), seen_s=NOW_S, late_at_s=NOW_S - LATE_S + 1), "late"),
        (now, "training"),
    ]
    standings = [AgentCondition.of(agent, NOW_S) for agent, _ in cases]
    assert [s.word for s in standings] == [word for _, word in cases]
    assert [s.rank for s in standings] == sorted(s.rank for s in standings)
    assert AgentCondition.of(AgentState(), NOW_S).word == "starting"
    assert (
        AgentCondition.of(AgentState(train=train(), seen_s=NOW_S, late_at_s=NOW_S - LATE_S - 1), NOW_S).word
        == "training"
    )


def test_an_agent_that_was_lost_says_why_where_there_is_room() -> None:
    fleet = going(2, lost=["a2"])
    text = "a2 lost: not heard of for 10.2 s"
    hear(fleet, COORDINATOR, Event(event="agent-lost", level="warning", text=text, agent="a2"))
    row = next(line for line in drawn(fleet, 160) if line.startswith("a2"))
    assert row.rstrip().endswith("  not heard of for 10.2 s")


def test_an_agent_that_is_slow_says_why_where_there_is_room() -> None:
    fleet = going(2)
    text = "a2 slow: no progress for 12.3 s"
    hear(fleet, COORDINATOR, Event(event="agent-slow", level="warning", text=text, agent="a2"))
    rows = drawn(fleet, 160)
    assert next(line for line in rows if line.startswith("a2")).rstrip().endswith("  no progress for 12.3 s")
    assert any("2 agents  1 slow" in line for line in rows)


def test_ages_in_words() -> None:
    assert [ago(s) for s in (0, 2.9, 3, 119, 120, 7199, 7200, 1e5, 1e6)] == [
        "now", "now", "3 s", "119 s", "2 min", "119 min", "2 h", "27 h", "11 d",
    ]  # fmt: skip


# -- before and after ---------------------------------------------------------------------------------------------------


def test_before_anything_is_heard_it_says_what_it_waits_for_and_what_to_do() -> None:
    fleet = FleetState()
    assert "no message from a coordinator so far" in drawn(fleet)
    hear(fleet, COORDINATOR, FleetStatus(agents=1, run="", queued=[]), "fleet")
    text = "\n".join(drawn(fleet))
    assert "waiting for a run  nats://hub:4222" in text
    assert "the coordinator is up with 1 agent; no run is active" in text
    assert "submit one: syncline run SPEC.yaml" in text


def test_a_name_that_is_mistyped_is_answered_with_what_is_near() -> None:
    text = "\n".join(drawn(going(2, wanted="digits-2")))
    assert "waiting for run digits-2" in text
    assert "did you mean digits-1?" in text


def test_a_run_that_has_ended_says_how() -> None:
    fleet = going(2)
    hear(fleet, COORDINATOR, Event(event="run-done", level="info", text="run digits-1: 40 versions"))
    lines = drawn(fleet)
    assert lines[0].startswith("run digits-1  done")
    assert lines[1] == "40 versions"
    assert lines[-1] == KEYS
    assert not any("training 55%" in line for line in lines), "what an agent did last is not what it does"


def test_a_run_that_waits_for_agents_says_for_how_many() -> None:
    fleet = FleetState()
    status = RunStatus(task="t:T", phase="waiting", version=0, versions=40, agents=2, needed=4, lost=[], reason="")
    hear(fleet, COORDINATOR, status)
    assert "waiting  2 of 4 agents" in drawn(fleet)[0]


def test_a_key_that_hears_no_agent_is_said() -> None:
    fleet = FleetState()
    for _ in range(3):
        status = RunStatus(task="t:T", phase="training", version=1, versions=4, agents=2, needed=2, lost=[], reason="")
        hear(fleet, COORDINATOR, status)
    assert any(line.startswith("no agent is heard: the key watch.nk") for line in drawn(fleet))


# -- lines --------------------------------------------------------------------------------------------------------------


def test_a_plain_line_says_where_the_run_stands() -> None:
    state = going(4, late=["a3"], lost=["a4"]).runs["digits-1"]
    assert version_line(state, 0.0)[10:] == (
        "run digits-1: version 13 of 40  accuracy 0.929  loss 0.0769  3 of 4 agents  late: a3  10.8 MB up, 4.8 MB down"
    )


def test_a_json_line_says_where_a_message_came_from_whatever_it_claims() -> None:
    heard = parse("syncline.v1.r.metrics.a1.newer", b"{}")
    assert heard is not None
    assert json_line(heard, b'{"loss": 0.5, "sender": "coordinator"}') == (
        '{"run": "r", "sender": "a1", "kind": "newer", "loss": 0.5}'
    )
    assert json_line(heard, b"no JSON") == json_line(heard, b"[1]") == ""


def test_what_is_heard_does_not_command_the_terminal() -> None:
    fleet = going(1)
    evil = "\x1b[2J\x07evil\nline"
    hear(fleet, COORDINATOR, Event(event="agent-lost", level="warning", text=evil, agent="a1"))
    hear(fleet, COORDINATOR, fleet.runs["digits-1"].status.model_copy(update={"task": evil, "reason": evil}))  # type: ignore[union-attr]
    for width in (80, 160):
        text = picture(fleet, width, 24, NOW_S, 0.0, "")
        assert isinstance(text, Text)
        assert "\x1b" not in text.plain and "\x07" not in text.plain
        assert text.plain.count("\n") == 23
