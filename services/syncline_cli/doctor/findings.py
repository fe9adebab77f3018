"""The findings of `syncline doctor`: one line per check, each with its hint."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

Verdict = Literal["ok", "warning", "broken", "skipped"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    `broken`: Syncline will not work with this. `warning`: Syncline works, with a restriction. `skipped`: not checked.
    """

    check: str
    verdict: Verdict
    text: str
    hint: str = ""


def ok(check: str, text: str) -> Finding:
    """Return the finding of a check that succeeded."""
    return Finding(check, "ok", text)


def warning(check: str, text: str, hint: str) -> Finding:
    """Return a finding that restricts the use of Syncline."""
    return Finding(check, "warning", text, hint)


def broken(check: str, text: str, hint: str) -> Finding:
    """Return a finding that must be repaired."""
    return Finding(check, "broken", text, hint)


def skipped(check: str, text: str) -> Finding:
    """Return the finding of a check that could not be made."""
    return Finding(check, "skipped", text)


def sound(findings: list[Finding]) -> bool:
    """Tell whether no finding is broken."""
    return all(finding.verdict != "broken" for finding in findings)


def as_lines(findings: list[Finding]) -> list[str]:
    """Return the lines for people: verdict, check and text; the hint below."""
    width = max((len(finding.check) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict:<8} {finding.check:<{width}}  {finding.text}")
        if finding.hint:
            lines.append(f"{'':<{9 + width}}  → {finding.hint}")
    return lines


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """Return the findings with the keys that scripts rely on."""
    return {"ok": sound(findings), "checks": [asdict(finding) for finding in findings]}


async def in_thread(work: Callable[[], T], timeout_s: float) -> T:
    """Return the result of a blocking call, made in a daemon thread.

    A thread that hangs in the kernel, as on a lost file server, does not keep the process from ending; an executor's would.

    Raises:
        TimeoutError: the call takes longer than `timeout_s`; the thread is abandoned.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if not done.done():
            done.set_exception(error) if error is not None else done.set_result(result)  # type: ignore[arg-type]

    def call() -> None:
        try:
            outcome: tuple[T | None, BaseException | None] = (work(), None)
        except Exception as error:
            outcome = (None, error)
        try:
            loop.call_soon_threadsafe(settle, *outcome)
        except RuntimeError:
            pass  # the loop was closed after the timeout

    threading.Thread(target=call, daemon=True).start()
    async with asyncio.timeout(timeout_s):
        return await done
