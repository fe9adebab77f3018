"""The loop with virtual time, and the guards of determinism."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import threading
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import aclosing
from typing import Any

import pytest

from syncline import chance
from syncline_sim.determinism import deterministic
from syncline_sim.loop import NotSimulated, Stuck, VirtualLoop
from syncline_sim.rng import Rng


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    made = VirtualLoop()
    yield made
    made.close()


def order_of_ten(order: Rng | None) -> list[int]:
    loop, ran = VirtualLoop(order), list[int]()

    async def ten() -> None:
        for i in range(10):
            loop.call_soon(ran.append, i)
        await asyncio.sleep(1)

    run(loop, ten())
    loop.close()
    return ran


def run(loop: VirtualLoop, work: Coroutine[Any, Any, Any]) -> Any:
    return loop.run_until_complete(work)


def test_an_hour_takes_no_time_and_timers_come_in_their_order(loop: VirtualLoop) -> None:
    rang: list[tuple[str, float]] = []

    async def ring(name: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        rang.append((name, loop.time()))

    async def all_of_them() -> None:
        await asyncio.gather(ring("late", 3000.0), ring("soon", 0.25), ring("middle", 60.0))

    began = time.monotonic()
    run(loop, all_of_them())
    assert time.monotonic() - began < 1
    assert rang == [("soon", 0.25), ("middle", 60.0), ("late", 3000.0)]


def test_a_timer_never_comes_before_its_time(loop: VirtualLoop) -> None:
    async def many() -> None:
        rng = Rng("1")
        for _ in range(1000):
            due = loop.time() + rng.uniform(1e-9, 1e-3)
            await asyncio.sleep(due - loop.time())
            assert loop.time() >= due

    run(loop, many())


def test_what_is_ready_runs_first_come_first_served_or_in_an_order_by_the_seed() -> None:
    assert order_of_ten(None) == list(range(10))
    assert order_of_ten(Rng("1")) == order_of_ten(Rng("1")) != order_of_ten(Rng("2"))
    assert sorted(order_of_ten(Rng("1"))) == list(range(10))


def test_an_executor_runs_inline(loop: VirtualLoop) -> None:
    async def ask() -> tuple[int, float]:
        thread = await loop.run_in_executor(None, threading.get_ident)
        with pytest.raises(ZeroDivisionError):
            await loop.run_in_executor(None, lambda: 1 // 0)
        return thread, loop.time()

    assert run(loop, ask()) == (threading.get_ident(), 0.0)


def test_waiting_for_what_never_comes_is_an_error_that_names_who_waits(loop: VirtualLoop) -> None:
    async def wait_for_nothing() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Stuck, match=r"no timer is set.*wait_for_nothing waiting"):
        run(loop, wait_for_nothing())
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))


def test_what_does_not_end_is_stopped_in_virtual_time_and_where_time_stands_still() -> None:
    async def for_ever(pause_s: float) -> None:
        for _ in itertools.count():
            await asyncio.sleep(pause_s)

    for pause_s, what in ((1.0, "did not end within 100 s"), (0.0, "time stands still")):
        loop = VirtualLoop(longest_s=100.0, max_turns=1000)
        task = loop.create_task(for_ever(pause_s))
        with pytest.raises(Stuck, match=what):
            loop.run_until_complete(task)
        task.cancel()
        loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        loop.close()


@pytest.mark.parametrize(
    "ask",
    [
        lambda loop: loop.add_signal_handler(1, print),
        lambda loop: loop.add_reader(0, print),
        lambda loop: loop.create_connection(print),
        lambda loop: loop.sock_recv(0, 1),
        lambda loop: loop.subprocess_exec(print),
        lambda loop: loop.call_soon_threadsafe(print),
    ],
)
def test_sockets_processes_signals_and_threads_are_refused(loop: VirtualLoop, ask: Any) -> None:
    with pytest.raises(NotSimulated, match="in a simulation"):
        ask(loop)


def test_a_generator_that_is_left_to_the_garbage_collector_is_an_error(loop: VirtualLoop) -> None:
    async def numbers() -> AsyncGenerator[int, None]:
        for number in range(3):
            yield number

    async def first() -> int:
        async for number in numbers():
            return number
        return -1

    async def closes_it() -> int:
        async with aclosing(numbers()) as found:
            return await anext(found)

    async def goes_on(after: Coroutine[Any, Any, int]) -> int:
        number = await after
        await asyncio.sleep(1.0)
        return number

    assert run(loop, goes_on(closes_it())) == 0
    with pytest.raises(NotSimulated, match=r"numbers was left to the garbage collector\. Close it"):
        run(loop, goes_on(first()))


def test_tasks_hash_by_their_number_so_that_sets_of_them_have_one_order(loop: VirtualLoop) -> None:
    async def begin() -> list[int]:
        tasks = [asyncio.ensure_future(asyncio.sleep(0)) for _ in range(20)]
        await asyncio.gather(*tasks)
        return [hash(task) for task in tasks]

    numbers = run(loop, begin())
    assert numbers == sorted(numbers) and max(numbers) < 1000


def test_guarded_code_gets_no_real_time_chance_or_thread_and_afterwards_all_is_as_before() -> None:
    before = (time.monotonic, random.random, os.urandom, threading.Thread.start)
    with deterministic(prefix=__name__):
        for ask in (time.monotonic, time.time, random.random, lambda: os.urandom(1), lambda: time.sleep(0)):
            with pytest.raises(NotSimulated, match=__name__):
                ask()
        with pytest.raises(NotSimulated, match="thread"):
            threading.Thread(target=print).start()
    assert before == (time.monotonic, random.random, os.urandom, threading.Thread.start)


def test_a_service_without_a_source_of_its_own_gets_no_chance_and_no_clock() -> None:
    with deterministic():
        for ask in (chance.new_id, chance.wall_time_s, lambda: chance.jitter(1.0)):
            with pytest.raises(NotSimulated, match="was not set for this service"):
                ask()
    assert len(chance.new_id()) == 32
