"""A child process that dies while a process that it has forked lives on: its service learns of it, and nothing stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from system.command import until

SERVICE = """
import asyncio, multiprocessing, os, signal, time
from syncline.runtime.child import Child, ChildDied, serve
from syncline.runtime.child_messages import Answer, Done, Question
from syncline.runtime.nursery import Nursery
from syncline.shm import SharedMemory

class HelperPid(Answer):
    kind = "helper-pid"
    pid: int

class StartHelper(Question[HelperPid]):
    kind = "start-helper"
    answer = HelperPid

class Die(Question[Done]):
    kind = "die"
    answer = Done

def helper(question):
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    process.start()
    return HelperPid(pid=process.pid)

def child(end_fd, memory_fd):
    return serve(end_fd, {StartHelper: helper, Die: lambda question: os.kill(os.getpid(), signal.SIGKILL)})

async def main(nursery):
    nursery.open()
    memory = SharedMemory()
    memory.grow(64)
    for dies in (True, False):
        it = await Child.start(nursery, "__main__:child", memory)
        print((await it.ask(StartHelper())).pid)
        if dies:
            try:
                await it.ask(Die())
            except ChildDied as error:
                print(error.from_outside, error)
        await it.close()
    await nursery.close()

asyncio.run(main(Nursery.start(("syncline.runtime.child",))))
"""


def test_a_child_that_dies_or_is_closed_takes_what_it_has_forked_with_it(tmp_path: Path) -> None:
    (tmp_path / "service.py").write_text(SERVICE)
    ran = subprocess.run([sys.executable, tmp_path / "service.py"], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    first, died, second = ran.stdout.splitlines()
    assert died.startswith("True process") and "was killed by SIGKILL (the kernel does so when memory runs out" in died
    for pid in (int(first), int(second)):
        until(lambda pid=pid: _is_gone(pid), 30.0, lambda pid=pid: f"process {pid} lives on")  # type: ignore[misc]


def _is_gone(pid: int) -> bool:
    """Also where nobody has asked yet what became of it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
