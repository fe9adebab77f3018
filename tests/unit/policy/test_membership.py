"""Sessions, signs of life and numbers: time is an argument, and who is lost is said with the reason."""

from __future__ import annotations

import pytest

from syncline.policy.membership import FIRST_STEP_S, Membership, Numbering

S1, S2, S3 = "1" * 32, "2" * 32, "3" * 32


@pytest.fixture
def fleet() -> Membership:
    return Membership(lost_after_s=5.0)


# -- sessions ----------------------------------------------------------------------------------------------------------
def test_the_first_to_claim_a_name_holds_it(fleet: Membership) -> None:
    assert fleet.claim("a", S1, 0.0) == ""
    assert fleet.holds("a", S1) and not fleet.holds("a", S2) and not fleet.holds("b", S1)


def test_a_later_claim_supersedes_the_session_that_held_the_name(fleet: Membership) -> None:
    fleet.claim("a", S1, 0.0)
    assert fleet.claim("a", S2, 1.0) == S1
    assert fleet.holds("a", S2) and not fleet.holds("a", S1)


def test_a_superseded_session_cannot_claim_again(fleet: Membership) -> None:
    fleet.claim("a", S1, 0.0)
    fleet.claim("a", S2, 1.0)
    assert fleet.claim("a", S1, 2.0) == ""
    assert fleet.holds("a", S2)
    fleet.expired(100.0)
    assert fleet.claim("a", S1, 101.0) == "" and not fleet.holds("a", S1), "not even when the other is gone"


def test_a_session_that_says_hello_again_keeps_its_name_and_counts_as_heard(fleet: Membership) -> None:
    fleet.claim("a", S1, 0.0)
    assert fleet.claim("a", S1, 4.0) == ""
    assert fleet.expired(8.0) == []


def test_sessions_of_different_names_do_not_meet(fleet: Membership) -> None:
    assert fleet.claim("a", S1, 0.0) == fleet.claim("b", S2, 0.0) == ""
    assert fleet.holds("a", S1) and fleet.holds("b", S2)


def test_what_is_remembered_of_superseded_sessions_is_bounded(fleet: Membership) -> None:
    for i in range(10_050):
        fleet.claim("a", f"{i:032x}", 0.0)
    assert len(fleet.superseded) == 10_000
    assert f"{10_048:032x}" in fleet.superseded, "the latest are kept"


def test_an_agent_that_is_expected_is_lost_where_it_does_not_come(fleet: Membership) -> None:
    fleet.expect("a", 0.0)
    fleet.expect("b", 0.0)
    assert fleet.claim("b", S1, 3.0) == "", "nobody is superseded"
    assert fleet.expired(5.1) == [("a", "not heard of for 5.1 s")]
    assert fleet.holds("b", S1)


def test_expecting_an_agent_that_is_here_changes_nothing(fleet: Membership) -> None:
    fleet.claim("a", S1, 0.0)
    fleet.expect("a", 4.0)
    assert fleet.holds("a", S1) and fleet.expired(5.1) == [("a", "not heard of for 5.1 s")]


# -- signs of life -----------------------------------------------------------------------------------------------------
def test_a_heartbeat_of_another_session_does_not_count(fleet: Membership) -> None:
    fleet.claim("a", S1, 0.0)
    assert not fleet.heard("a", S2, 1, True, 4.0) and not fleet.heard("b", S1, 1, True, 4.0)
    assert fleet.expired(5.1) == [("a", "not heard of for 5.1 s")]


def test_an_agent_not_heard_of_is_lost_and_forgotten(fleet: Membership) -> None:
    fleet.claim("a", S1, 0.0)
    assert fleet.heard("a", S1, 0, False, 2.0)
    assert fleet.expired(7.0) == [], "exactly so long is not too long"
    assert fleet.expired(7.01) == [("a", "not heard of for 5.0 s")]
    assert fleet.expired(9.0) == [] and not fleet.holds("a", S1)


def test_all_who_are_lost_are_named_in_the_order_of_their_names(fleet: Membership) -> None:
    for agent in ("c", "a", "b"):
        fleet.claim(agent, S1, 0.0)
    fleet.heard("b", S1, 0, False, 4.0)
    assert [agent for agent, _ in fleet.expired(6.0)] == ["a", "c"]


def test_an_agent_that_was_lost_may_come_back_with_the_same_session(fleet: Membership) -> None:
    fleet.claim("a", S1, 0.0)
    fleet.expired(6.0)
    assert not fleet.heard("a", S1, 0, False, 7.0), "it must say hello first"
    assert fleet.claim("a", S1, 7.0) == "" and fleet.heard("a", S1, 0, False, 7.0)


def beats(fleet: Membership, progress: int, training: bool, *, until_s: int, since_s: int = 0) -> None:
    """A heartbeat each second that says the same."""
    for second in range(since_s, until_s + 1):
        assert fleet.heard("a", S1, progress, training, float(second))


def test_an_agent_that_answers_and_makes_no_progress_is_slow_and_not_lost(fleet: Membership) -> None:
    fleet.claim("a", S1, 0.0)
    beats(fleet, 7, True, until_s=5)
    assert fleet.slowed(5.0, 0.0) == []
    fleet.heard("a", S1, 7, True, 5.5)
    assert fleet.slowed(5.5, 0.0) == [("a", "no progress for 5.5 s, more than 5 s (agents.lost_after_s)")]
    assert fleet.is_slow("a")
    beats(fleet, 7, True, since_s=6, until_s=1000)
    assert fleet.slowed(1000.0, 0.0) == [], "said once"
    assert fleet.expired(1000.0) == [] and fleet.holds("a", S1), "however long it takes"


def test_a_run_that_is_opened_again_is_told_once_more_who_is_slow(fleet: Membership) -> None:
    fleet.claim("a", S1, 0.0)
    beats(fleet, 7, True, until_s=6)
    assert fleet.slowed(6.0, 0.0), "while no run is open"
    fleet.expect("a", 6.0)
    assert fleet.slowed(6.0, 0.0) and fleet.is_slow("a")
    fleet.expect("a", 6.0, slow=True)
    assert fleet.slowed(6.0, 0.0) == [], "the run knows it from its roster"


def test_a_slow_agent_whose_heartbeats_stop_is_lost(fleet: Membership) -> None:
    fleet.claim("a", S1, 0.0)
    beats(fleet, 7, True, until_s=6)
    assert fleet.slowed(6.0, 0.0)
    assert fleet.expired(11.5) == [("a", "not heard of for 5.5 s")] and not fleet.is_slow("a")


@pytest.mark.parametrize(("progress", "training"), [(8, True), (7, False)])
def test_a_slow_agent_is_present_again_with_the_next_sign_of_progress(
    fleet: Membership, progress: int, training: bool
) -> None:
    fleet.claim("a", S1, 0.0)
    beats(fleet, 7, True, until_s=6)
    assert fleet.slowed(6.0, 0.0) and fleet.is_slow("a")
    fleet.heard("a", S1, progress, training, 7.0)
    assert not fleet.is_slow("a")


def test_a_step_in_time_keeps_it_present(fleet: Membership) -> None:
    fleet.claim("a", S1, 0.0)
    beats(fleet, 7, True, until_s=4)
    beats(fleet, 8, True, since_s=5, until_s=9)
    assert fleet.slowed(9.0, 0.0) == []


def test_slow_periods_make_patient(fleet: Membership) -> None:
    fleet.claim("a", S1, 0.0)
    beats(fleet, 7, True, until_s=30)
    assert fleet.slowed(30.0, 10.0) == []
    fleet.heard("a", S1, 7, True, 30.5)
    why = "no progress for 30.5 s, more than 30 s (three of its usual pauses or of the run's periods)"
    assert fleet.slowed(30.5, 10.0) == [("a", why)]


def test_an_agent_whose_every_step_is_long_is_not_slow(fleet: Membership) -> None:
    """Steps of 13 s, with 5 s of patience and no version so far: the first step shows how long one takes."""
    fleet.claim("a", S1, 0.0)
    for second in range(200):
        assert fleet.heard("a", S1, second // 13, True, float(second))
        assert fleet.slowed(float(second), 0.0) == []


def test_a_single_long_pause_is_soon_forgotten(fleet: Membership) -> None:
    fleet.claim("a", S1, 0.0)
    beats(fleet, 1, True, until_s=500)
    for second in range(501, 511):
        fleet.heard("a", S1, second, True, float(second))
    beats(fleet, 510, True, since_s=511, until_s=516)
    assert [agent for agent, _ in fleet.slowed(516.0, 0.0)] == ["a"]


def test_the_first_step_of_a_process_may_take_longer(fleet: Membership) -> None:
    fleet.claim("a", S1, 0.0)
    beats(fleet, 0, True, until_s=int(FIRST_STEP_S))
    assert fleet.slowed(FIRST_STEP_S, 0.0) == []
    fleet.heard("a", S1, 0, True, FIRST_STEP_S + 1)
    assert fleet.slowed(FIRST_STEP_S + 1, 0.0) == [
        ("a", "no progress for 601.0 s, more than 600 s (a first step may take)")
    ]


def test_an_agent_that_waits_makes_no_steps_and_is_not_slow(fleet: Membership) -> None:
    fleet.claim("a", S1, 0.0)
    beats(fleet, 7, False, until_s=1000)
    assert fleet.slowed(1000.0, 0.0) == [] and fleet.expired(1000.0) == []


def test_work_that_begins_after_a_long_wait_has_the_whole_time(fleet: Membership) -> None:
    fleet.claim("a", S1, 0.0)
    beats(fleet, 7, False, until_s=100)
    beats(fleet, 7, True, since_s=101, until_s=105)
    assert fleet.slowed(105.0, 0.0) == []


def test_the_next_expiry_is_that_of_who_was_silent_longest(fleet: Membership) -> None:
    assert fleet.next_expiry_s(0.0) is None
    fleet.claim("a", S1, 0.0)
    fleet.claim("b", S2, 1.0)
    assert fleet.next_expiry_s(0.0) == 5.0
    fleet.heard("a", S1, 0, False, 3.0)
    assert fleet.next_expiry_s(0.0) == 6.0


def test_the_next_expiry_is_that_of_an_agent_that_makes_no_progress(fleet: Membership) -> None:
    fleet.claim("a", S1, 0.0)
    beats(fleet, 7, True, until_s=4)
    assert fleet.next_expiry_s(0.0) == 5.0 and fleet.next_expiry_s(2.5) == 7.5
    beats(fleet, 7, True, since_s=5, until_s=6)
    assert fleet.slowed(6.0, 0.0) and fleet.next_expiry_s(0.0) == 11.0, (
        "it is slow already: only its silence is looked for"
    )


# -- numbers -----------------------------------------------------------------------------------------------------------
def test_agents_are_numbered_by_name_and_not_by_arrival() -> None:
    numbering = Numbering()
    assert numbering.admit(["c", "a", "b", "a"]) == []
    assert numbering.names == ["a", "b", "c"] and numbering.parts == 3


def test_a_number_is_for_good() -> None:
    numbering = Numbering()
    numbering.admit(["m"])
    numbering.admit(["a", "m", "z"])
    assert numbering.names == ["m", "a", "z"] and numbering.parts == 3


def test_there_is_one_part_before_the_first_agent() -> None:
    assert Numbering().parts == 1


def test_fixed_parts_stay_and_bound_the_number_of_agents() -> None:
    numbering = Numbering(fixed_parts=2)
    assert numbering.admit(["a"]) == [] and numbering.parts == 2
    assert numbering.admit(["c", "b"]) == [("c", "all partition.parts = 2 parts have an agent")]
    assert numbering.names == ["a", "b"] and numbering.parts == 2


def test_no_more_agents_than_the_run_takes() -> None:
    numbering = Numbering(max_agents=1)
    assert numbering.admit(["b", "a"]) == [("b", "the run has its agents.max = 1 agents")]
    assert numbering.admit(["a"]) == [], "who has a number keeps it"


def test_of_two_bounds_the_one_that_is_reached_is_named() -> None:
    assert Numbering(fixed_parts=2, max_agents=1).admit(["a", "b"]) == [("b", "the run has its agents.max = 1 agents")]
    assert Numbering(fixed_parts=1, max_agents=2).admit(["a", "b"]) == [
        ("b", "all partition.parts = 1 parts have an agent")
    ]
