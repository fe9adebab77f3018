"""Crashes, cuts and power failures at every instant, one by one: the run ends with the same bits, or fails with a reason."""

from __future__ import annotations

from typing import Literal

import pytest

from syncline.spec.run_spec import RunSpec
from syncline.wire.chunks import LEAST_PAYLOAD_BYTES
from syncline.wire.messages import BlobRef, Head
from syncline_coordinator.recovery import LossDetector
from syncline_sim.faults import Crash, Cut, Faults, Lose, shrunk
from syncline_sim.invariants import Invariants
from syncline_sim.rng import Rng
from syncline_sim.scenario import Outcome, Scenario, small_spec
from syncline_sim.seeds import explain, scenario_of
from syncline_sim.simulate import simulate

pytestmark = pytest.mark.long

SHORT = Scenario(small_spec(stop={"versions": 3}))
CALM = simulate(SHORT)
BEGAN_S = 0.57  # when the first round was opened
OPERATIONS = CALM.operations["coordinator"]


def digest(outcome: Outcome) -> str:
    assert not outcome.problems, "\n".join([*outcome.problems, *outcome.timeline])
    assert outcome.head is not None
    return outcome.head.digest


def when(outcome: Outcome, words: str) -> float:
    """The time in seconds of the first line that says so."""
    return next(float(line.split()[0]) for line in outcome.timeline if words in line)


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_a_coordinator_killed_at_any_bus_operation_changes_no_bit_of_a_synchronous_run(kind: str) -> None:
    """Before the odd ones are sent, and when the even ones are done and not answered. Outer momentum is kept as well."""
    scenario = Scenario(small_spec(stop={"versions": 3}, outer={"kind": kind}, task_options={"elements": 1500}))
    calm = simulate(scenario)
    assert calm.operations["coordinator"] > 100
    for at_op in range(1, calm.operations["coordinator"] + 1):
        when: Literal["before", "done"] = "before" if at_op % 2 else "done"
        outcome = simulate(scenario, Faults().crash("coordinator", at_op=at_op, when=when))
        assert digest(outcome) == digest(calm), at_op
        assert outcome.merged == calm.merged, at_op


RECORDS = 3  # manifest, roster, and the roster before it


@pytest.mark.parametrize("keep", [2, 3])
def test_whoever_takes_over_clears_up_what_the_dead_one_has_put_in_part(
    keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the purge the stream, which has room for the kept models and one more, would discard blobs that head names."""
    settings = {"outer": {"kind": "momentum"}, "keep_models": keep, "wire": {"chunk_bytes": 4096}}
    scenario = Scenario(small_spec(stop={"versions": 5}, task_options={"elements": 2500}, **settings))
    books: list[Invariants] = []

    def noted(spec: RunSpec) -> Invariants:
        books.append(Invariants(spec))
        return books[-1]

    monkeypatch.setattr("syncline_sim.simulate.Invariants", noted)

    def left(faults: Faults) -> tuple[int, int]:
        """Models with their outer state, and all blobs."""
        digest(simulate(scenario, faults))
        there = {tuple(s.split(".")[3:5]) for s in books[-1].chunks.keys() - books[-1].gone}
        return sum(kind == "outer" for kind, _ in there), sum(kind in ("model", "outer") for kind, _ in there)

    room = (keep + 1, 2 * (keep + 1) + RECORDS)  # the last purge may come after the end of the run
    for at_op in (0, *range(60, 240, 4)):
        models, blobs = left(Faults().crash("coordinator", at_op=at_op) if at_op else Faults())
        assert keep <= models <= room[0] and blobs <= room[1], (
            f"{models}, {blobs} where there is room for {room}: {at_op}"
        )


def test_a_commit_interrupted_between_a_large_record_and_its_line_leaves_nothing_and_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scenario = Scenario(small_spec(stop={"versions": 3}), max_payload=LEAST_PAYLOAD_BYTES)
    books: list[Invariants] = []

    def noted(spec: RunSpec) -> Invariants:
        books.append(Invariants(spec))
        return books[-1]

    monkeypatch.setattr("syncline_sim.simulate.Invariants", noted)
    calm, interrupted = simulate(scenario), 0
    assert isinstance(books[-1].lines[1, 1].record, BlobRef), "the record is not large here"
    for at_op in range(60, calm.operations["coordinator"] + 1):
        assert digest(simulate(scenario, Faults().crash("coordinator", at_op=at_op, when="done"))) == digest(calm)
        log = [tuple(map(int, s.split(".")[4:6])) for s in books[-1].chunks if ".log." in s]
        there = [tuple(map(int, s.split(".")[4:6])) for s in books[-1].chunks.keys() - books[-1].gone if ".log." in s]
        assert set(there) == set(books[-1].committed.items()), at_op
        interrupted += len(set(log) - books[-1].lines.keys())
    assert interrupted >= 3, "no crash fell between a record and its line"


def test_a_run_whose_log_is_full_fails_and_drops_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test makes the reserved space too small."""
    monkeypatch.setattr("syncline_coordinator.reservation.LOG_BYTES", 4000)
    monkeypatch.setattr("syncline_coordinator.reservation.LOG_VERSION_BYTES", 0)
    monkeypatch.setattr("syncline_coordinator.reservation.LOG_UPDATE_BYTES", 0)
    outcome = simulate(Scenario(small_spec(stop={"versions": 20})))
    assert outcome.head is not None and outcome.head.phase == "failed" and 0 < outcome.head.version < 20
    assert outcome.head.reason.startswith("stop.versions: the log of commits is full at version")


def test_an_answer_that_never_comes_changes_no_bit_of_a_synchronous_run() -> None:
    for at_op in range(1, OPERATIONS + 1, 3):
        assert digest(simulate(SHORT, Faults().unanswered("coordinator", at_op=at_op))) == digest(CALM), at_op
    for at_op in range(1, CALM.operations["a1"] + 1):
        assert digest(simulate(SHORT, Faults().unanswered("a1", at_op=at_op))) == digest(CALM), at_op


@pytest.mark.parametrize("disk", [True, False])
def test_an_agent_killed_at_any_bus_operation_comes_back_and_the_run_ends(disk: bool) -> None:
    for at_op in range(1, CALM.operations["a2"] + 1):
        digest(simulate(SHORT, Faults().crash("a2", at_op=at_op, disk=disk)))


def test_a_coordinator_that_was_replaced_and_comes_back_stops_or_goes_on_and_breaks_nothing() -> None:
    for after_ms in range(550, 1000, 30):
        for for_s in (0.05, 0.3):
            faults = Faults().zombie(after_s=after_ms / 1000, for_s=for_s)
            assert digest(simulate(SHORT, faults)) == digest(CALM), faults


@pytest.mark.parametrize("for_s", [0.0, 0.05, 1.0, 15.0])
def test_connections_that_come_back_change_no_bit_where_nobody_was_counted_as_lost(for_s: float) -> None:
    patient = Scenario(small_spec(stop={"versions": 3}, agents={"min": 4, "lost_after_s": 60.0}))
    for service in ("coordinator", "a3"):
        for after_s in (0.1, 0.55, 0.65, 0.7, 0.8):
            assert digest(simulate(patient, Faults().cut(service, after_s=after_s, for_s=for_s))) == digest(CALM)


@pytest.mark.parametrize("for_s", [0.0, 0.5, 20.0])
def test_a_broker_that_restarts_loses_no_run(for_s: float) -> None:
    for after_ms in range(500, 1000, 25):
        digest(simulate(SHORT, Faults().restart_broker(after_s=after_ms / 1000, for_s=for_s)))


def test_a_broker_that_lost_acknowledged_writes_is_noticed_and_what_was_lost_is_made_again() -> None:
    """10 ms to 0.3 s are lost, at every moment from the first round on, with and without a crash of the coordinator."""
    for after_ms in range(600, 1000, 25):
        for lost_s in (0.01, 0.03, 0.1, 0.3):
            faults = Faults().roll_back(after_s=after_ms / 1000, lost_s=lost_s, for_s=0.1)
            if after_ms / 1000 - lost_s < BEGAN_S:
                continue  # the run is submitted again then, and its agents have its periods on their disks
            outcome = simulate(SHORT, faults)
            assert digest(outcome) == digest(CALM), faults
            both = faults.down("coordinator", after_s=after_ms / 1000, for_s=0.5)
            digest(simulate(SHORT, both))


def test_updates_that_the_broker_lost_before_or_after_they_were_offered_are_made_again() -> None:
    """The failure comes under the second term, with and without a crash of the coordinator.

    A restarted coordinator may make the lost version again before an agent reports the loss. Then the update after the lost one
    is made again instead of the lost one.
    """
    killed = Faults().down("coordinator", after_s=0.65, for_s=0.05)
    same: list[bool] = []
    for after_ms in range(900, 1500, 50):
        for lost_s in (0.1, 0.2, 0.3, 0.4, 0.5):
            faults = killed.roll_back(after_s=after_ms / 1000, lost_s=lost_s, for_s=0.1)
            for both in (faults, faults.down("coordinator", after_s=after_ms / 1000, for_s=0.3)):
                made = digest(simulate(SHORT, both))
                if after_ms / 1000 - lost_s >= BEGAN_S:  # else it is another submission
                    same.append(made == digest(CALM))
    assert same.count(False) <= 1 < len(same), f"{same.count(False)} of {len(same)}"


LARGE = {"task_options": {"elements": 2500}, "wire": {"chunk_bytes": 4096, "window": 1}}  # a model of several chunks


def test_a_model_that_is_lost_in_part_while_it_is_put_is_merged_again() -> None:
    spec = small_spec(agents={"min": 2, "lost_after_s": 10.0}, stop={"versions": 3}, **LARGE)
    scenario = Scenario(spec, ("a1", "a2"), (0.1,), longest_delay_s=0.02)
    calm = simulate(scenario)
    decided, committed = (when(calm, words) for words in ("merging round 2", "training round 3"))
    for k in range(1, 12):
        for lost_s in (0.02, 0.05, 0.1):
            faults = Faults().roll_back(after_s=decided + (committed - decided) * k / 12, lost_s=lost_s, for_s=0.1)
            assert digest(simulate(scenario, faults)) == digest(calm), faults


def test_an_outer_state_that_is_lost_is_not_named_by_head() -> None:
    """The next coordinator could not continue without the outer state."""
    spec = small_spec(
        agents={"min": 2, "lost_after_s": 10.0}, stop={"versions": 3}, outer={"kind": "momentum"}, **LARGE
    )
    scenario = Scenario(spec, ("a1", "a2"), (0.1,), longest_delay_s=0.02)
    calm = simulate(scenario)
    merged_s = when(calm, "version 2 training")
    for k in range(12):
        faults = Faults().roll_back(after_s=merged_s - 0.01 * k, lost_s=0.02, for_s=0.1)
        again = simulate(scenario, faults)
        digest(again)
        committed_s = when(again, "version 2 training")
        digest(simulate(scenario, faults.down("coordinator", after_s=committed_s + 0.03, for_s=0.3)))


def test_a_commit_record_that_is_lost_before_its_version_is_put_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check before head is written, a version is committed without a record."""
    spec = small_spec(
        agents={"min": 2, "lost_after_s": 10.0}, stop={"versions": 3}, outer={"kind": "momentum"}, **LARGE
    )
    scenario = Scenario(spec, ("a1", "a2"), (0.1,), longest_delay_s=0.02)
    merged_s = when(simulate(scenario), "version 2 training")

    def problems() -> list[str]:
        times_s = [merged_s - 0.001 * k for k in range(40)]
        outcomes = (simulate(scenario, Faults().roll_back(after_s=at, lost_s=0.02, for_s=0.1)) for at in times_s)
        return [problem for outcome in outcomes for problem in outcome.problems]

    async def never(self: LossDetector, head: Head, before: Head) -> None:
        pass

    assert not problems()
    monkeypatch.setattr(LossDetector, "_check_commit_record", never)
    assert any("without a record" in problem for problem in problems())


def test_a_first_version_that_is_lost_is_made_anew_by_whoever_takes_over() -> None:
    scenario = Scenario(
        small_spec(agents={"min": 2, "lost_after_s": 10.0}, stop={"versions": 2}), ("a1", "a2"), longest_delay_s=0.02
    )
    for after_ms in range(700, 940, 10):
        faults = Faults().roll_back(after_s=after_ms / 1000, lost_s=0.05, for_s=0.1)
        digest(simulate(scenario, faults.down("coordinator", after_s=after_ms / 1000 + 0.25, for_s=0.5)))


def test_a_run_that_the_broker_lost_as_a_whole_can_be_submitted_again() -> None:
    for lost_s in (0.3, 1.0):
        outcome = simulate(SHORT, Faults().roll_back(after_s=0.75, lost_s=lost_s, for_s=0.1))
        digest(outcome)
        assert sum("term 1 version 0 waiting" in line for line in outcome.timeline) > 2


def test_where_head_names_what_is_lost_the_run_fails_and_says_why() -> None:
    """Each stream is flushed at a time of its own, so head may survive and its model may be lost."""
    ends: dict[str, int] = {}
    for after_ms in range(700, 1000, 10):
        outcome = simulate(SHORT, Faults().roll_back(after_s=after_ms / 1000, lost_s=0.1, for_s=0.1, torn=True))
        assert not outcome.problems, "\n".join([*outcome.problems, *outcome.timeline])
        assert outcome.head is not None
        ends[outcome.head.phase] = ends.get(outcome.head.phase, 0) + 1
        if outcome.head.phase == "failed":
            assert "a blob that head names is not on the bus any more" in outcome.head.reason
    assert set(ends) == {"done", "failed"}, ends


def test_lost_core_messages_cost_time_alone() -> None:
    patient = Scenario(small_spec(stop={"versions": 3}, agents={"min": 4, "lost_after_s": 60.0}))
    for share in (0.3, 1.0):
        assert digest(simulate(patient, Faults().lose(share, after_s=0.3, for_s=10.0))) == digest(CALM)


def test_a_killed_training_child_and_a_second_process_of_the_same_name_end_well() -> None:
    for after_ms in range(500, 1000, 50):
        digest(simulate(SHORT, Faults().kill_trainer("a1", after_s=after_ms / 1000)))
        twin = simulate(SHORT, Faults().twin("a1", after_s=after_ms / 1000))
        digest(twin)
        assert any("Superseded" in line for line in twin.timeline)


def test_a_participant_that_goes_while_its_round_is_opened_is_numbered_all_the_same() -> None:
    for after_ms in range(1830, 1870, 2):
        digest(simulate(scenario_of(1675), Faults().twin("a1", after_s=after_ms / 1000), seed=1675))


def test_schedules_are_drawn_by_the_seed_and_every_fault_ends() -> None:
    draws = [Faults.random(Rng(str(seed)), ("coordinator", "a1", "a2")) for seed in range(200)]
    assert draws == [Faults.random(Rng(str(seed)), ("coordinator", "a1", "a2")) for seed in range(200)]
    assert {type(fault).__name__ for faults in draws for fault in faults.items} >= {"Crash", "Cut", "Lose", "Zombie"}
    assert all(faults.over_s < 60 for faults in draws)


def test_a_schedule_is_made_as_small_as_the_failure_needs() -> None:
    guilty = Cut("a1", 1.0, 2.0)
    schedule = Faults((Lose(0.5, 0.0, 1.0), guilty, Crash("a2", 3), guilty))
    assert shrunk(schedule, lambda faults: guilty in faults.items) == Faults((guilty,))
    assert explain(0) is None
