"""A nursery forks worker processes from one that has imported the heavy modules already, and lets none of them outlive it.

Importing torch takes seconds; forking takes milliseconds. So one single-threaded process imports it once and then forks
whatever its owner asks for. The same part serves an agent (its training child), the coordinator (its evaluator) and
`syncline demo` (all services).

Nothing is left behind, whoever is killed: the nursery kills its workers when its owner's end of the socket closes, and on
Linux the kernel kills the nursery when its owner dies, be it in the middle of an import, and the workers when the nursery
does. A worker that hangs inside a training step, holding the interpreter, changes nothing about that: the nursery runs no
code of its workers. Each of them leads a process group of its own, and what it has forked is killed when it has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from syncline.errors import SynclineError

MAX_MESSAGE_BYTES = 64 * 1024
MAX_FDS = 8
FORKS_AT_ONCE = 16  # asked for and not answered: their messages have room in the socket while the nursery imports
_PR_SET_PDEATHSIG = 1
_STOPS = (signal.SIGINT, signal.SIGTERM)


class NurseryDied(SynclineError):
    """The nursery process is gone, and its workers with it."""


@dataclass(slots=True)
class Worker:
    """A forked process. `exited` resolves to its exit code, negative for a signal, as in `subprocess`."""

    number: int
    pid: int
    exited: asyncio.Future[int]
    _nursery: Nursery

    def signal(self, which: signal.Signals) -> None:
        """Sends a signal; to a worker that has exited it does nothing."""
        if not self.exited.done():
            self._nursery.tell({"signal": self.number, "with": int(which)})


@dataclass(slots=True)
class Nursery:
    """The owner's side. Start it in the main thread, before the event loop and any other thread; `open` it in the loop."""

    pid: int
    _socket: socket.socket
    _workers: dict[int, Worker] = field(default_factory=dict)
    _started: dict[int, asyncio.Future[Worker]] = field(default_factory=dict)
    _room: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(FORKS_AT_ONCE))
    _next: int = 0
    _lines: _Lines = field(default_factory=lambda: _Lines())
    _process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(cls, preload: Sequence[str] = ()) -> Nursery:
        """Forks this process where it has the modules already, else starts a fresh interpreter that imports them."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        owner = os.getpid()
        if all(module in sys.modules for module in preload) and preload:
            pid = os.fork()
            if pid == 0:
                os.setsid()  # out of the group of its owner, which may be a worker itself
                ours.close()
                _serve_and_exit(theirs, owner, ())
            theirs.close()
            return cls(pid, ours)
        # -P: without it the working directory would be first on sys.path, here and in all that multiprocessing starts
        command = [sys.executable, "-P", "-m", "syncline.runtime.nursery", str(theirs.fileno()), str(owner), *preload]
        process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        return cls(process.pid, ours, _process=process)

    def open(self) -> None:
        self._socket.setblocking(False)
        asyncio.get_running_loop().add_reader(self._socket, self._on_readable)

    async def fork(self, target: str, *args: Any, fds: Sequence[int] = ()) -> Worker:
        """Calls `package.module:function(*args, *fds)` in a new process; args are JSON. Raises NurseryDied."""
        async with self._room:
            self._next += 1
            number, loop = self._next, asyncio.get_running_loop()
            started: asyncio.Future[Worker] = loop.create_future()
            self._started[number] = started
            try:
                self.tell({"fork": number, "target": target, "args": args}, fds)
                return await started
            finally:
                started.cancel()  # if nobody waits for it any more

    def tell(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        try:
            _send(self._socket, message, fds)
        except OSError as error:
            self._lost()
            raise NurseryDied(f"the nursery (pid {self.pid}) is gone: {error.strerror}") from None

    async def close(self, grace_s: float = 2.0) -> None:
        """Ends the workers, with SIGTERM and after `grace_s` with SIGKILL, and reaps the nursery."""
        for worker in list(self._workers.values()):
            try:
                worker.signal(signal.SIGTERM)
            except NurseryDied:
                break
        pending = [w.exited for w in self._workers.values()]
        if pending:
            await asyncio.wait(pending, timeout=grace_s)
        left = any(not w.exited.done() for w in self._workers.values())
        self._lost()
        self._socket.close()  # the nursery sees the end and kills what is left
        if not left:
            _kill(self.pid, signal.SIGKILL)  # it holds nothing, and may be importing for seconds yet
        await asyncio.get_running_loop().run_in_executor(None, self._reap)

    def _reap(self) -> None:
        try:
            if self._process is not None:
                self._process.wait()
            else:
                os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass  # reaped by somebody else

    def _on_readable(self) -> None:
        try:
            messages = self._lines.receive(self._socket)
        except BlockingIOError:
            return
        if messages is None:
            self._lost()
            return
        for message, _ in messages:
            self._on_message(message)

    def _on_message(self, message: dict[str, Any]) -> None:
        if "started" in message:
            number, loop = message["started"], asyncio.get_running_loop()
            worker = self._workers[number] = Worker(number, message["pid"], loop.create_future(), self)
            started = self._started.pop(number)
            if not started.done():
                started.set_result(worker)
                return
            with contextlib.suppress(NurseryDied):
                worker.signal(signal.SIGKILL)
        else:
            worker = self._workers.pop(message["exited"])
            if not worker.exited.done():
                worker.exited.set_result(message["code"])

    def _lost(self) -> None:
        """No more news from the nursery: everything it ran is ended."""
        if self._socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._socket)
        for started in self._started.values():
            if not started.done():
                started.set_exception(NurseryDied(f"the nursery (pid {self.pid}) is gone"))
        self._started.clear()
        for worker in self._workers.values():
            if not worker.exited.done():
                worker.exited.set_result(-signal.SIGKILL)
        self._workers.clear()


@dataclass(slots=True)
class _Lines:
    """One JSON message a line, and the file descriptors that came with each."""

    _rest: bytes = b""
    _fds: list[int] = field(default_factory=list)

    def receive(self, end: socket.socket) -> list[tuple[dict[str, Any], list[int]]] | None:
        """The messages that have arrived; None when the other side is gone."""
        try:
            data, fds, _, _ = socket.recv_fds(end, MAX_MESSAGE_BYTES, MAX_FDS)
        except ConnectionError:
            return None
        if not data:
            return None
        self._fds += fds
        *lines, self._rest = (self._rest + data).split(b"\n")
        found = []
        for message in map(json.loads, lines):
            count = message.get("fds", 0)
            found.append((message, self._fds[:count]))
            del self._fds[:count]
        return found


def _send(end: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    data = json.dumps({**message, "fds": len(fds)} if fds else message).encode() + b"\n"
    if fds:
        socket.send_fds(end, [data], list(fds))
    else:
        end.send(data)


# -- the nursery's own process -------------------------------------------------------------------------------------------


def _serve_and_exit(owner: socket.socket, owner_pid: int, preload: Sequence[str]) -> NoReturn:
    code = 1
    try:
        die_with_parent(owner_pid)
        _serve(owner, preload)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _serve(owner: socket.socket, preload: Sequence[str]) -> None:
    """Forks on request, reports exits, and kills everything when the owner is gone."""
    for which in _STOPS:
        signal.signal(which, signal.SIG_IGN)  # the owner decides; its end is ours
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for module in preload:
        importlib.import_module(module)
    workers: dict[int, int] = {}  # pid → number
    lines = _Lines()
    try:
        while True:
            ready = select.select([owner.fileno(), wake_read], [], [])[0]
            if wake_read in ready:
                os.read(wake_read, 4096)
                _report_exits(owner, workers)
            if owner.fileno() in ready and not _obey(owner, lines, workers, (wake_read, wake_write)):
                return
    finally:
        for pid in workers:
            _kill(pid, signal.SIGKILL)
        for pid in workers:
            os.waitpid(pid, 0)
            _kill_group(pid)


def _obey(owner: socket.socket, lines: _Lines, workers: dict[int, int], wake: tuple[int, int]) -> bool:
    """What the owner says; False when there is no owner any more."""
    messages = lines.receive(owner)
    for message, fds in messages or ():
        if "signal" in message:
            for pid, number in workers.items():
                if number == message["signal"]:
                    _kill(pid, message["with"])
            continue
        parent = os.getpid()
        signal.pthread_sigmask(
            signal.SIG_BLOCK, _STOPS
        )  # else one that comes before the worker listens is lost: we ignore it
        pid = os.fork()
        if pid == 0:
            for inherited in (owner.fileno(), *wake):
                os.close(inherited)
            _be_worker(parent, message["target"], [*message["args"], *fds])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
        for fd in fds:
            os.close(fd)
        workers[pid] = message["fork"]
        _say(owner, {"started": message["fork"], "pid": pid})
    return messages is not None


def _report_exits(owner: socket.socket, workers: dict[int, int]) -> None:
    for pid in list(workers):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            _kill_group(pid)
            _say(owner, {"exited": workers.pop(pid), "code": os.waitstatus_to_exitcode(status)})


def _say(owner: socket.socket, message: dict[str, Any]) -> None:
    try:
        _send(owner, message)
    except OSError:
        pass  # the owner is gone; the next read says so


def _be_worker(parent: int, target: str, args: Sequence[Any]) -> NoReturn:
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for which in (*_STOPS, signal.SIGCHLD):
            signal.signal(which, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
        die_with_parent(parent)
        module, _, function = target.partition(":")
        code = getattr(importlib.import_module(module), function)(*args) or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def die_with_parent(parent: int) -> None:
    """On Linux: this process gets SIGKILL when `parent`, its parent process, dies, whatever it is doing then."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)


def _kill(pid: int, which: int) -> None:
    try:
        os.kill(pid, which)
    except ProcessLookupError:
        pass


def _kill_group(leader: int) -> None:
    """What a worker has left behind. As long as that is there, no other process is given the worker's number."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # macOS: for a group of zombies
        pass


if __name__ == "__main__":
    _serve_and_exit(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), sys.argv[3:])
