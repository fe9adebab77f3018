"""What a run says of itself: each finding from the facts that cause it, once, and nothing where all is well."""

from __future__ import annotations

from typing import Any

import pytest

from syncline.policy.advice import Adviser, Norms

NAMES = ("a1", "a2", "a3", "a4")


def adviser(**changes: Any) -> Adviser:
    return Adviser(**{"waits": True, "max_lag": None, "max_ahead": None, "by_rows": False, **changes})


def play(
    adviser: Adviser,
    versions: int = 20,
    *,
    rows: dict[str, int] | None = None,
    seconds: dict[str, float] | None = None,
    merges: dict[str, int] | None = None,
    stale: tuple[str, ...] = (),
    norms: Norms | None = None,
) -> list[tuple[str, str]]:
    """Versions in which every agent is merged `merges` times, or dropped with a lag of 9; what is said, with whom."""
    said = []
    for _ in range(versions):
        for name in NAMES:
            for _ in range((merges or {}).get(name, 1)):
                adviser.offered(name, (rows or {}).get(name, 100), (seconds or {}).get(name, 1.0))
                adviser.judged(name, 9 if name in stale else 1, merged=name not in stale, too_stale=name in stale)
        said += [(a.agent, a.text) for a in adviser.committed(norms)]
    return said


@pytest.mark.parametrize("settings", [{}, {"max_lag": 8}, {"max_ahead": 3, "max_lag": 8}, {"by_rows": True}])
def test_an_even_fleet_needs_no_advice(settings: dict[str, Any]) -> None:
    assert play(adviser(**settings)) == []


def test_an_agent_that_is_always_too_stale_is_named_with_the_bound_it_would_need() -> None:
    ((agent, text),) = play(adviser(max_lag=8), stale=("a4",))
    assert agent == "a4" and "max_lag = 8" in text and "of 4 in all 0 were merged" in text and "to 9 at least" in text


def test_one_update_in_time_takes_it_back() -> None:
    lucky = adviser(max_lag=8)
    for _ in range(10):
        for merged in (False, False, False, True):
            lucky.judged("a1", 9, merged=merged, too_stale=not merged)
            assert lucky.committed() == []


def test_a_fast_agent_that_dominates_an_asynchronous_run_is_named_with_its_share() -> None:
    ((agent, text),) = play(adviser(waits=False, max_lag=8), merges={"a1": 5})
    assert agent == "a1" and "has made 62% of what was merged, where an even share is 25%" in text
    assert play(adviser(), merges={"a1": 5}) == [], "in rounds, everybody is merged as often"


@pytest.mark.parametrize(
    ("settings", "hint"),
    [({}, "sync.quorum with grace_s"), ({"max_ahead": 3, "max_lag": 20}, "leave sync.max_ahead out")],
)
def test_who_is_waited_for_is_named_with_how_much_slower_it_is(settings: dict[str, Any], hint: str) -> None:
    ((agent, text),) = play(adviser(**settings), seconds={"a3": 5.0})
    assert agent == "a3" and "takes 5.0 times as long" in text and hint in text
    assert play(adviser(waits=False), seconds={"a3": 5.0}) == [], "nobody waits for it"
    assert play(adviser(), seconds=dict.fromkeys(NAMES, 0.001) | {"a3": 0.005}) == [], "not worth a word"


def test_a_slow_agent_of_two_is_seen_too() -> None:
    two = adviser()
    for _ in range(12):
        two.offered("a1", 10, 1.0)
        two.offered("a2", 10, 3.0)
        two.judged("a1", 0, merged=True)
        two.judged("a2", 0, merged=True)
        assert [a.agent for a in two.committed()] in ([], ["a2"])
    assert two._given == {("a2", "slow")}


def test_an_agent_that_claims_a_great_many_rows_is_named_where_rows_are_weights() -> None:
    ((agent, text),) = play(adviser(by_rows=True), rows={"a2": 10_000_000})
    assert agent == "a2" and "10,000,000 rows" in text and "merge.weights: uniform" in text
    assert play(adviser(), rows={"a2": 10_000_000}) == []


def test_an_outlier_is_named_with_how_much_longer_its_update_is() -> None:
    norms = Norms({"a1": 1.0, "a2": 1.1, "a3": 0.9, "a4": 20.0}, drift=0.9)
    ((agent, text),) = play(adviser(), 3, norms=norms)
    assert agent == "a4" and "19 times as long" in text and "norm_clip" in text


def test_updates_that_pull_against_each_other_are_told_after_some_rounds_of_it() -> None:
    norms = Norms(dict.fromkeys(NAMES, 1.0), drift=0.1)
    assert play(adviser(), 4, norms=norms) == []
    ((agent, text),) = play(adviser(), 12, norms=norms)
    assert agent == "" and "is 0.100 of the mean" in text and "scaffold" in text
    assert play(adviser(), 12, norms=Norms(dict.fromkeys(NAMES, 1.0), drift=0.25)) == [], (
        "unrelated, as late in any training"
    )


def test_short_updates_that_cancel_are_the_end_of_a_good_training() -> None:
    arriving = adviser()
    for k in range(20):
        norms = Norms(dict.fromkeys(NAMES, 0.7**k), drift=max(0.02, 0.6 - 0.1 * k))
        assert arriving.committed(norms) == []


def test_agents_that_drift_apart_are_told_where_alpha_lets_them() -> None:
    def growing(settings: Adviser) -> list[str]:
        said = []
        for k in range(10):
            norms = Norms(dict.fromkeys(NAMES, 1.0 + 0.1 * k), drift=0.9)
            said += [a.text for a in settings.committed(norms)]
        return said

    (text,) = growing(adviser(alpha=0.5))
    assert "has grown for 5 rounds" in text and "mix.alpha (now 0.5)" in text
    assert growing(adviser(alpha=1.0)) == []
