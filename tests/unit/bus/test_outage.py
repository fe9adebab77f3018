"""A lost connection is told once, each cause that keeps it away once, and its return once."""

from __future__ import annotations

import pytest

from syncline.bus.nats.outage import (
    MOST_CAUSES,
    NO_CAUSE,
    NO_SERVER,
    REFUSED_KEY,
    TOO_LATE,
    UNANSWERED,
    Outage,
    explained,
)

LOST = "the connection to the broker at nats://hub:4222 is lost"
AWAY = "the broker at nats://hub:4222 is out of reach"


@pytest.fixture
def outage() -> Outage:
    return Outage("nats://hub:4222")


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert {record.levelname for record in caplog.records} <= {"WARNING"}
    return [record.getMessage() for record in caplog.records]


def test_an_outage_of_both_connections_is_told_once_with_its_causes(
    outage: Outage, caplog: pytest.LogCaptureFixture
) -> None:
    outage.error("control", "nats: unexpected EOF", 10.0)
    outage.lost("control", 10.0)
    outage.lost("bulk", 10.1)
    for second in range(11, 80):
        for lane in ("control", "bulk"):
            outage.error(lane, f"Multiple exceptions: [Errno 111] Connect call failed ('::1', {second})", float(second))
    outage.back("bulk", 80.0)
    outage.back("control", 80.5)
    assert told(caplog) == [
        f"{LOST}: unexpected EOF; connecting again",
        f"{AWAY}: {NO_SERVER}",
        "connected to the broker at nats://hub:4222 again, after 70.5 s",
    ]


def test_a_key_that_was_revoked_is_told_as_such_and_only_once(outage: Outage, caplog: pytest.LogCaptureFixture) -> None:
    outage.error("control", "nats: authorization failed", 1.0)
    outage.lost("control", 1.0)
    outage.error("control", "the broker at nats://hub:4222 does not know this key", 2.0)
    assert told(caplog) == [f"{LOST}: {REFUSED_KEY}; connecting again"]


def test_an_error_of_long_ago_is_no_cause(outage: Outage, caplog: pytest.LogCaptureFixture) -> None:
    outage.error("control", "nats: slow consumer, messages dropped", 1.0)
    outage.lost("control", 60.0)
    assert told(caplog) == [f"{LOST}: {NO_CAUSE}; connecting again"]


def test_a_connection_that_is_begun_anew_again_and_again_is_told_of_once_until_something_is_answered(
    outage: Outage, caplog: pytest.LogCaptureFixture
) -> None:
    def begun_anew(at_s: float) -> None:
        outage.unanswered("bulk", at_s)
        outage.lost("bulk", at_s)
        outage.back("bulk", at_s + 0.25)

    for at_s in (10.0, 20.0, 30.0):
        begun_anew(at_s)
        outage.answered("control")
    once = [
        f"{LOST}: {UNANSWERED}; connecting again",
        "connected to the broker at nats://hub:4222 again, after 0.2 s",
    ]
    assert told(caplog) == once
    outage.answered("bulk")
    begun_anew(40.0)
    assert told(caplog) == 2 * once


def test_another_cause_is_told_of_a_connection_that_is_begun_anew_and_so_is_its_return(
    outage: Outage, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        outage.unanswered("bulk", 1.0)
        outage.lost("bulk", 1.0)
        outage.error("bulk", "[Errno 111] Connect call failed ('127.0.0.1', 4222)", 2.0)
        outage.back("bulk", 3.0)
    lines = told(caplog)
    assert [line.partition(":4222 ")[2] for line in lines[3:]] == [
        f"is out of reach: {NO_SERVER}",
        "again, after 2.0 s",
    ]


def test_the_next_outage_is_told_again_and_the_causes_of_one_are_bounded(
    outage: Outage, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        outage.lost("bulk", 1.0)
        outage.lost("bulk", 1.0)
        outage.back("bulk", 2.0)
    assert len(told(caplog)) == 4
    outage.lost("bulk", 3.0)
    for i in range(100):
        outage.error("bulk", f"strange {i}", 3.0)
    assert len(told(caplog)) == 4 + MOST_CAUSES


def test_causes_are_in_the_operators_terms() -> None:
    assert explained("nats: 'Authorization Violation'") == explained("User Authentication Revoked") == REFUSED_KEY
    assert explained("[Errno 111] Connect call failed ('127.0.0.1', 4222)") == NO_SERVER
    assert explained("nats: timeout") == explained("Operation timed out") == TOO_LATE
