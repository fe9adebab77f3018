"""A run that does not move says why, by and by: for whom or for what it waits."""

from __future__ import annotations

from syncline.observe.fleet_state import FleetState
from syncline.observe.run_state import RunState
from syncline.observe.standstill import QUIET_S, WORK_S, Standstill
from syncline.observe.telemetry import FleetStatus, Published, RunStatus, Train
from syncline.wire import subjects
from syncline.wire.subjects import COORDINATOR, FLEET


def status(phase: str, **changes: object) -> RunStatus:
    known = {"task": "t:T", "version": 2, "versions": 3, "agents": 2, "needed": 2, "lost": [], "reason": ""}
    return RunStatus.model_validate({**known, "phase": phase, **changes})


def train(state: str, step: int = 0, clock: int = 0) -> Train:
    return Train(
        state=state, version=0, clock=clock, step=step, steps=20, part=0, rows=4, bytes_up=0, bytes_down=0
    )  # fmt: skip


class Watcher:
    """Hears the same again every two seconds, and looks every second."""

    def __init__(self) -> None:
        self.fleet, self.still, self.now_s = FleetState("r", {"r": RunState("r", 3)}), Standstill(), 100.0
        self.often: list[tuple[str, Published]] = []

    def hears(self, who: str, said: Published) -> None:
        self.often = [o for o in self.often if (o[0], o[1].kind) != (who, said.kind)] + [(who, said)]

    def looks(self, seconds: float) -> list[tuple[float, str]]:
        """What was said, each after how many seconds."""
        found, began_s = [], self.now_s
        while self.now_s <= began_s + seconds:
            for who, said in self.often:
                run = FLEET if isinstance(said, FleetStatus) else "r"
                data = said.model_dump_json().encode()
                self.fleet.handle(subjects.metrics(run, who, said.kind), data, self.now_s)
            if text := self.still.look(self.fleet, None, self.now_s):
                found.append((self.now_s - began_s, text))
            self.now_s += 1
        return found


def test_agents_that_are_missing_are_counted_more_and_more_seldom() -> None:
    watcher = Watcher()
    watcher.hears(COORDINATOR, status("waiting", agents=0, version=0))
    said = watcher.looks(200)
    assert said[0] == (QUIET_S, "waiting for agents: 0 of 2 are present")
    assert [at for at, _ in said] == [10.0, 20.0, 40.0, 80.0, 160.0]
    watcher.hears(COORDINATOR, status("waiting", agents=1, version=0))
    assert watcher.looks(QUIET_S) == [(QUIET_S, "waiting for agents: 1 of 2 are present")]


def test_agents_that_make_no_step_are_named() -> None:
    watcher = Watcher()
    watcher.hears(COORDINATOR, status("training"))
    for agent, at_work in (("a10", "training"), ("a2", "fetching"), ("a3", "waiting")):
        watcher.hears(agent, train(at_work))
    ((at, text),) = watcher.looks(WORK_S + 5)
    assert (at, text.partition(";")[0]) == (WORK_S, "waiting for a2, a10: no step for 30 s")
    assert "An agent without a step within 600 s of its start counts as slow" in text
    watcher.hears("a10", train("training", step=1))
    watcher.hears("a2", train("waiting", clock=1))
    assert watcher.looks(WORK_S) == [(WORK_S, "waiting for a10: no step for 30 s")]


def test_slow_agents_are_named_where_no_other_is_there() -> None:
    watcher = Watcher()
    watcher.hears(COORDINATOR, status("waiting").model_copy(update={"slow": ["a10", "a2"]}))
    assert watcher.looks(QUIET_S) == [(QUIET_S, "waiting for a2, a10: slow, no progress")]


def test_steps_are_progress_and_nothing_is_said() -> None:
    watcher = Watcher()
    watcher.hears(COORDINATOR, status("training"))
    for step in range(10):
        watcher.hears("a1", train("training", step=step))
        assert watcher.looks(WORK_S / 2) == []


def test_an_evaluation_at_the_end_that_takes_long_is_said() -> None:
    watcher = Watcher()
    watcher.hears(COORDINATOR, status("waiting", version=3))
    watcher.hears("a1", train("waiting", clock=3))
    expected = "all 3 versions are made; their last evaluation has taken 30 s so far"
    assert watcher.looks(WORK_S) == [(WORK_S, expected)]


def test_a_run_in_the_queue_says_which_goes_first_and_a_silent_coordinator_is_told() -> None:
    watcher = Watcher()
    watcher.hears(COORDINATOR, FleetStatus(agents=2, run="other", queued=["r"]))
    assert watcher.looks(QUIET_S) == [(QUIET_S, "queued: run other is active")]
    watcher.hears(COORDINATOR, FleetStatus(agents=2, run="r", queued=[]))
    assert watcher.looks(QUIET_S)[0][1] == "the coordinator loads the task and makes the model, for 10 s"
    watcher.often.clear()
    assert watcher.looks(30)[0][1].startswith("no message from the coordinator for ")


def test_a_run_that_has_ended_has_nothing_to_say() -> None:
    watcher = Watcher()
    watcher.hears(COORDINATOR, status("done", version=3))
    assert watcher.looks(200) == []
