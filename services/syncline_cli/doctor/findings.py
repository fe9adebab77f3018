"""What `syncline doctor` finds: one line per check, each with its hint. Pure."""

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
    """`broken`: it will not work like this. `warning`: it works, and somebody should know. `skipped`: it could not be told."""

    check: str
    verdict: Verdict
    text: str
    hint: str = ""


def ok(check: str, text: str) -> Finding:
    return Finding(check, "ok", text)


def warning(check: str, text: str, hint: str) -> Finding:
    return Finding(check, "warning", text, hint)


def broken(check: str, text: str, hint: str) -> Finding:
    return Finding(check, "broken", text, hint)


def skipped(check: str, text: str) -> Finding:
    return Finding(check, "skipped", text)


def sound(findings: list[Finding]) -> bool:
    return all(finding.verdict != "broken" for finding in findings)


def as_lines(findings: list[Finding]) -> list[str]:
    """For people: verdict, check, what was found; below it what to do."""
    wide = max((len(finding.check) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict:<8} {finding.check:<{wide}}  {finding.text}")
        if finding.hint:
            lines.append(f"{'':<{9 + wide}}  → {finding.hint}")
    return lines


def as_json(findings: list[Finding]) -> dict[str, Any]:
    return {"ok": sound(findings), "checks": [asdict(finding) for finding in findings]}


async def in_thread(work: Callable[[], T], timeout_s: float) -> T:
    """What a call that blocks returns. Raises TimeoutError when it takes too long, and then leaves it alone: a thread that
    hangs in the kernel, on a file server that is gone, must not keep us from ending (an executor's would)."""
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
            pass  # we waited long enough, and have ended

    threading.Thread(target=call, daemon=True).start()
    async with asyncio.timeout(timeout_s):
        return await done
