"""What `syncline why` says of a commit: keys for scripts, lines for people."""

from __future__ import annotations

from syncline.wire.messages import BlobRef, Committed, Head, PlanEntry
from syncline_cli.commands.why import as_lines, as_object
from unit.stored_run import RUN, commit

MODEL = BlobRef(id="0" * 32, size=24, chunks=2)
HEAD = Head(run=RUN, term=1, version=9, phase="training")


def lines(record: Committed, rows: int | None = 20) -> list[str]:
    return [line for line, _ in as_lines(record, HEAD, rows)]


def test_scripts_find_what_they_rely_on() -> None:
    said = as_object(commit(8, 2, MODEL))
    assert said["version"] == 8
    assert said["closed_by"] == "quorum 2 of 3 + 1.0 s"
    assert said["merged"] == [
        {"agent": "a1", "clock": 8, "lag": 0, "weight": 0.5, "seconds": 1.25},
        {"agent": "a2", "clock": 8, "lag": 1, "weight": 0.5, "seconds": 2.5},
    ]
    assert said["dropped"] == [{"agent": "a4", "clock": 8, "reason": "late: the round of version 0 is closed"}]
    assert said["late"] == ["a3"]
    assert said["bytes"] == said["bytes_up"] + said["bytes_down"] == 3_000_000
    assert said["phases_s"] == {"collect": 1.5, "merge": 0.25}


def test_people_read_who_was_merged_late_or_dropped_and_why() -> None:
    assert lines(commit(8, 2, MODEL))[:-1] == [
        "run digits-1, version 8 of 9 so far",
        "  closed by: quorum 2 of 3 + 1.0 s",
        "  merged  clock  lag  weight  rows  steps  seconds",
        "  a2          8    1     0.5   449     20    2.500",
        "  a1          8    0     0.5   449     20    1.250",
        "  late: a3; the round closed without its update",
        "  dropped: a4, clock 8: late: the round of version 0 is closed",
        "  collect 1.500 s, merge 0.250 s; 2.0 MB up, 1.0 MB down",
    ]


def test_the_newest_version_is_not_one_of_so_many() -> None:
    assert lines(commit(9, 1, MODEL))[0] == "run digits-1, version 9"


def test_of_hundreds_the_farthest_behind_are_shown_and_the_rest_counted() -> None:
    record = commit(8, 1, MODEL)
    many = [
        PlanEntry(agent=f"a{i}", clock=8, lag=i % 3, weight=0.0025, blob=MODEL, digest=b"d" * 32) for i in range(400)
    ]
    record = record.model_copy(update={"plan": record.plan.model_copy(update={"merged": many, "late": ["a3"] * 30})})
    shown = lines(record, 5)
    assert [line.split()[0] for line in shown[3:8]] == ["a2", "a5", "a8", "a11", "a14"]
    assert "  … and 395 more: --all shows them" in shown
    assert "  … and 25 more: --all shows them" in shown
    assert len(lines(record, None)) == 2 + 1 + 400 + 30 + 1 + 2


def test_what_an_agent_says_does_not_command_the_terminal() -> None:
    record = commit(8, 1, MODEL)
    plan = record.plan.model_copy(update={"reason": "\x1b[2J3 of 4"})
    assert "\x1b" not in "".join(lines(record.model_copy(update={"plan": plan})))
