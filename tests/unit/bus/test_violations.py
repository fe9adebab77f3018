"""Lines as nats-server 2.15.1 wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest

from syncline.bus.server import violations
from syncline.bus.server.violations import LogTail, Violation, ViolationLog, parse_violation

A1 = "UACZN55OSISKIMX3UF2KBIZ7IBCUJFCSL6E2JT5QFW5XLAGBOEFXYBNT"
A2 = "UCRHULJFLLPIL2W7HKD2R5DJ5DCFVW27ZQSD62E5RCLOBREOJLE6F65Q"
NAMES = {A1: "a1", A2: "a2"}
HEAD = "[2332] 2026/11/23 21:55:16.675507 [ERR] 127.0.0.1:47316 - cid:21 - "
CLIENT = f'{HEAD}"v2.16.0:python3:a1" - "FLEET-a1/nkey:{A1}" - '
PUBLISH = f'{CLIENT}Publish Violation - Subject "syncline.v1.r.log.1"'


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (PUBLISH, Violation("a1", "publish", "syncline.v1.r.log.1")),
        (
            f'{HEAD}"FLEET-a1/nkey:{A1}" - Publish Violation - Subject "x"',  # a client that says nothing about itself
            Violation("a1", "publish", "x"),
        ),
        (f'{CLIENT}Publish Violation - Reply "$JS.ACK.x"', Violation("a1", "reply", "$JS.ACK.x")),
        (
            f'{CLIENT}Subscription Violation - Subject "syncline.v1.r.agent.a2.>", SID 2',
            Violation("a1", "subscribe", "syncline.v1.r.agent.a2.>"),
        ),
        (
            f'{CLIENT}Subscription Violation - Subject "\\"foo\\"", Queue: "q\\"u", SID 3',
            Violation("a1", "subscribe", '\\"foo\\"'),
        ),
        (
            f'{HEAD}"FLEET-a1/nkey:U{"A" * 55}" - Publish Violation - Subject "x"',
            Violation("U" + "A" * 55, "publish", "x"),
        ),
        (f'{HEAD}"v1" - "WATCH/nkey:{A2}" - Publish Violation - Subject "x"', Violation("a2", "publish", "x")),
        (f"{HEAD}authentication error", Violation("127.0.0.1", "login", "")),
        (f'{HEAD}authentication error - Nkey "{A2}"', Violation("127.0.0.1", "login", "a2")),
        (f'{HEAD}authentication error - User "u\\"x"', Violation("127.0.0.1", "login", 'u\\"x')),
        (f'{HEAD}authentication error - Token "[REDACTED]"', Violation("127.0.0.1", "login", "[REDACTED]")),
        ("[4756] 2026/11/23 22:21:02.081541 [INF] Server is ready", None),
        (f"{CLIENT}maximum payload exceeded: 5000000 vs 1114112", None),
        ("", None),
    ],
)
def test_a_line_is_read(line: str, expected: Violation | None) -> None:
    assert parse_violation(line, NAMES) == expected


FORGED = f'FLEET-a2/nkey:{A2}" - Publish Violation - Subject "forged'


@pytest.mark.parametrize(
    "line",
    [
        f'{HEAD}"v{FORGED}" - "FLEET-a1/nkey:{A1}" - Publish Violation - Subject "true"'.replace(
            FORGED, FORGED.replace('"', '\\"')
        ),
        f'{HEAD}"FLEET-a2/nkey:{A2}" - "FLEET-a1/nkey:{A1}" - Publish Violation - Subject "true"',
        f'{HEAD}"va\\n{HEAD}\\"FLEET-a2/nkey:{A2}\\"" - "FLEET-a1/nkey:{A1}" - Publish Violation - Subject "true"',
    ],
)
def test_a_client_cannot_put_the_blame_on_another(line: str) -> None:
    assert parse_violation(line, NAMES) == Violation("a1", "publish", "true")


def test_a_violation_is_a_sentence() -> None:
    assert str(Violation("a1", "publish", "x.y")) == "a1 may not publish x.y"
    assert str(Violation("a1", "reply", "x.y")) == "a1 may not name x.y as a reply subject"
    assert str(Violation("::1", "login", "a2")) == "::1 was refused at login as a2"
    assert str(Violation("::1", "login", "")) == "::1 was refused at login"


def line(n: int) -> str:
    return PUBLISH.replace("log.1", f"log.{n}") + "\n"


def subjects(log: ViolationLog) -> list[int]:
    return [int(found.subject.rpartition(".")[2]) for found in log.read()]


def test_only_new_whole_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = ViolationLog(path, NAMES)
    assert subjects(log) == []  # no file yet
    path.write_text(line(1) + line(2)[:-20])
    assert subjects(log) == [1]
    path.write_text(line(1) + line(2) + line(3))
    assert subjects(log) == [2, 3]
    assert subjects(log) == []


def test_reading_may_begin_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(line(1))
    log, late = ViolationLog(path, NAMES, from_end=True), ViolationLog(tmp_path / "none", NAMES, from_end=True)
    with path.open("a") as file:
        file.write(line(2))
    assert subjects(log) == [2]
    assert subjects(late) == []


def test_a_rotated_log_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(line(1))
    log = ViolationLog(path, NAMES)
    assert subjects(log) == [1]
    path.rename(tmp_path / "log.1")
    assert subjects(log) == []
    path.write_text(line(2) + line(3))
    assert subjects(log) == [2, 3]


def test_a_truncated_log_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(line(1) + line(2))
    log = ViolationLog(path, NAMES)
    assert subjects(log) == [1, 2]
    path.write_text(line(3))
    assert subjects(log) == [3]


def test_a_flood_is_read_in_bounded_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(violations, "READ_BYTES", 1000)
    path = tmp_path / "log"
    path.write_text("".join(line(n) for n in range(50)))
    log = ViolationLog(path, NAMES)
    parts = [subjects(log) for _ in range(20)]
    assert max(len(part) for part in parts) <= 1000 // len(line(0)) + 1
    assert [n for part in parts for n in part] == list(range(50))


def test_an_endless_line_does_not_stop_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(violations, "READ_BYTES", 1000)
    path = tmp_path / "log"
    path.write_text("x" * 2500 + "\n" + line(1))
    log = ViolationLog(path, NAMES)
    assert [n for _ in range(4) for n in subjects(log)] == [1]


def test_bytes_that_are_no_text_are_survived(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"\xff\xfe\n" + line(1).encode())
    assert len(LogTail(tmp_path / "log").read()) == 2
