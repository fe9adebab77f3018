"""When an answer is late on a connection that carries chunks. Time is an argument, or simulated."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from syncline.bus.silence import ANSWER_S, LEAST_BYTES_PER_S, Queue, Watch

CHUNK = 1 << 20
CHUNK_S = CHUNK / LEAST_BYTES_PER_S
Simulated = Callable[[Coroutine[Any, Any, Any]], tuple[Any, float]]


def test_a_small_question_has_little_time_and_a_chunk_what_the_thinnest_link_takes() -> None:
    queue = Queue()
    assert queue.wait_s(queue.ask(0, 10.0), 10.0) == ANSWER_S
    chunk = queue.ask(CHUNK, 20.0)
    assert queue.wait_s(chunk, 20.0) == ANSWER_S + CHUNK_S
    assert queue.wait_s(chunk, 20.0 + ANSWER_S + CHUNK_S) == 0.0


def test_whoever_queues_is_not_late_while_others_are_answered() -> None:
    """Eight chunks at the least rate: each is answered a chunk's time after the one before."""
    queue = Queue()
    turns = [queue.ask(CHUNK, 0.0) for _ in range(8)]
    for i in range(8):
        now_s = CHUNK_S * (i + 1)
        assert all(queue.wait_s(turn, now_s) > 0 for turn in turns[i:])
        queue.answered(turns[i], now_s)


def test_a_silent_connection_is_one_for_all_who_queue() -> None:
    queue = Queue()
    turns = [queue.ask(CHUNK, 0.0) for _ in range(8)]
    queue.answered(turns[0], 1.0)
    assert [queue.wait_s(turn, 1.0 + ANSWER_S + CHUNK_S) for turn in turns[1:]] == [0.0] * 7


def test_something_small_behind_a_chunk_has_the_chunks_time() -> None:
    queue = Queue()
    chunk, small = queue.ask(CHUNK, 0.0), queue.ask(100, 0.0)
    assert queue.wait_s(small, 0.0) == ANSWER_S + CHUNK_S
    queue.answered(chunk, 50.0)
    assert queue.wait_s(small, 50.0) == pytest.approx(ANSWER_S, abs=0.01)


def test_whoever_was_overtaken_is_late_although_the_connection_is_not_silent() -> None:
    queue = Queue()
    lost = queue.ask(1600, 0.0)
    for now_s in range(1, 10):
        queue.answered(queue.ask(1600, now_s), now_s)
    assert queue.wait_s(lost, 10.0) == pytest.approx(ANSWER_S + 1600 / LEAST_BYTES_PER_S)
    assert lost.overtaken_at_s == 10.0
    queue.answered(queue.ask(1600, 14.0), 14.0)
    assert queue.wait_s(lost, 16.0) < 0


def test_a_watch_calls_once_and_not_before_it_is_time(simulated: Simulated) -> None:
    called: list[float] = []

    async def watch() -> None:
        queue, loop = Queue(), asyncio.get_running_loop()
        turn = queue.ask(CHUNK, loop.time())
        Watch(queue, turn, lambda: called.append(loop.time()))
        Watch(queue, turn, lambda: called.append(0.0)).cancel()
        await asyncio.sleep(1000.0)

    simulated(watch())
    assert called == [pytest.approx(ANSWER_S + CHUNK_S)]
