"""A child reports progress while it works on a large model in one long call."""

from __future__ import annotations

import threading

import pytest

from syncline_agent import background_progress as module
from syncline_agent.background_progress import LARGE_BYTES, SLOWEST_BYTES_PER_S


def test_long_work_on_a_large_model_ticks_and_its_thread_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.001)
    ticked, threads = threading.Event(), threading.active_count()
    with module.background_progress(ticked.set, LARGE_BYTES):
        assert ticked.wait(30.0)
    assert threading.active_count() == threads


def test_a_small_model_needs_no_thread() -> None:
    threads = threading.active_count()
    with module.background_progress(lambda: None, LARGE_BYTES - 1):
        assert threading.active_count() == threads


def test_work_that_takes_longer_than_the_slowest_disk_reports_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, ticks = [0.0], []

    class Never(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            now_s[0] += timeout or 0.0
            return False

    monkeypatch.setattr("syncline_agent.background_progress.time.monotonic", lambda: now_s[0])
    module._tick(Never(), lambda: ticks.append(now_s[0]), 40 * SLOWEST_BYTES_PER_S / SLOWEST_BYTES_PER_S)
    assert len(ticks) == 79 and now_s[0] == 40.0
