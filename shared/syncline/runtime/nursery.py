"""Fork worker processes from a process that has imported the heavy modules, and let no worker outlive its owner.

Importing torch takes seconds; forking takes milliseconds. So one single-threaded process, the nursery, imports torch once and
then forks workers for its owner: an agent (its training child), the coordinator (its evaluator) and `syncline demo` (all
services).

No process is left behind, whichever of them is killed: the nursery kills its workers when its owner's end of the socket
closes. On Linux the kernel also kills the nursery when its owner dies, even in the middle of an import, and the workers when
the nursery dies. A worker that hangs inside a training step, holding the interpreter, does not prevent this, because the
nursery runs no code of its workers. Each worker leads a process group of its own; the group is killed when the worker ends.

On the socket each message is a line of JSON; `Fork`, `Signal`, `Started` and `Exited` are its types.
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
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from syncline.errors import SynclineError

MAX_MESSAGE_BYTES = 64 * 1024
MAX_FDS = 8
FORKS_AT_ONCE = 16  # requests without an answer yet: they fit into the socket's buffer while the nursery imports
_PR_SET_PDEATHSIG = 1
_STOPS = (signal.SIGINT, signal.SIGTERM)


class NurseryDied(SynclineError):
    """The nursery process has ended, and its workers with it."""


@dataclass(frozen=True, slots=True)
class Fork:
    """Request: call `target(*args, *descriptors)` in a new process."""

    worker: int  # number that the owner gives it
    target: str  # package.module:function
    args: list[Any]  # JSON values of the caller
    fds: int  # descriptors that travel with the message


@dataclass(frozen=True, slots=True)
class Signal:
    """Request: send a signal to a worker."""

    worker: int
    signal: int


@dataclass(frozen=True, slots=True)
class Started:
    """Report: a worker runs."""

    worker: int
    pid: int


@dataclass(frozen=True, slots=True)
class Exited:
    """Report: a worker has ended. `code`: negative for a signal, as in `subprocess`."""

    worker: int
    code: int


Message = Fork | Signal | Started | Exited
MESSAGES: dict[str, type[Any]] = {"fork": Fork, "signal": Signal, "started": Started, "exited": Exited}
KINDS = {message: kind for kind, message in MESSAGES.items()}


@dataclass(slots=True)
class Worker:
    """A forked process.

    Attributes:
        exited: resolves to the exit code, negative for a signal, as in `subprocess`.
    """

    number: int
    pid: int
    exited: asyncio.Future[int]
    _nursery: Nursery

    def signal(self, which: signal.Signals) -> None:
        """Send a signal, unless the worker has exited. Raises NurseryDied."""
        if not self.exited.done():
            self._nursery.send(Signal(self.number, int(which)))


@dataclass(slots=True)
class Nursery:
    """The owner's side of a nursery. Start it in the main thread, before any other thread; `open` it in the event loop."""

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
        """Fork this process if it has imported the modules already, else start a fresh interpreter that imports them.

        Args:
            preload: modules that the workers need.
        """
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
        """Listen to the nursery in the running event loop."""
        self._socket.setblocking(False)
        asyncio.get_running_loop().add_reader(self._socket, self._on_readable)

    async def fork(self, target: str, *args: Any, fds: Sequence[int] = ()) -> Worker:
        """Call a function in a new process.

        Args:
            target: `package.module:function`; its result is the exit code, None for 0.
            args: JSON values, the function's first arguments.
            fds: descriptors that the worker inherits, the function's last arguments.

        Raises:
            NurseryDied: the nursery has ended.
        """
        async with self._room:
            self._next += 1
            number, loop = self._next, asyncio.get_running_loop()
            started: asyncio.Future[Worker] = loop.create_future()
            self._started[number] = started
            try:
                self.send(Fork(number, target, list(args), len(fds)), fds)
                return await started
            finally:
                started.cancel()  # a caller that was cancelled does not wait for the worker any more

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a request. Raises NurseryDied."""
        try:
            _send(self._socket, message, fds)
        except OSError as error:
            self._lost()
            raise NurseryDied(f"the nursery (pid {self.pid}) is gone: {error.strerror}") from None

    async def close(self, grace_s: float = 2.0) -> None:
        """End the workers, with SIGTERM and after `grace_s` with SIGKILL, and reap the nursery."""
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
            _kill(self.pid, signal.SIGKILL)  # it has no workers, and may be busy with imports for seconds
        await asyncio.get_running_loop().run_in_executor(None, self._reap)

    def _reap(self) -> None:
        try:
            if self._process is not None:
                self._process.wait()
            else:
                os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass  # another thread of this process has reaped it

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

    def _on_message(self, message: Message) -> None:
        if isinstance(message, Started):
            exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            worker = Worker(message.worker, message.pid, exited, self)
            self._workers[message.worker] = worker
            started = self._started.pop(message.worker)
            if not started.done():
                started.set_result(worker)
                return
            with contextlib.suppress(NurseryDied):  # the caller was cancelled meanwhile
                worker.signal(signal.SIGKILL)
        elif isinstance(message, Exited):
            worker = self._workers.pop(message.worker)
            if not worker.exited.done():
                worker.exited.set_result(message.code)

    def _lost(self) -> None:
        """Treat all workers as ended: the nursery is gone, and so are they."""
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
    """Splits a stream into messages, with the file descriptors that came with each."""

    _rest: bytes = b""
    _fds: list[int] = field(default_factory=list)

    def receive(self, end: socket.socket) -> list[tuple[Message, list[int]]] | None:
        """Return the messages that have arrived; None when the other side is gone."""
        try:
            data, fds, _, _ = socket.recv_fds(end, MAX_MESSAGE_BYTES, MAX_FDS)
        except ConnectionError:
            return None
        if not data:
            return None
        self._fds += fds
        *lines, self._rest = (self._rest + data).split(b"\n")
        found = []
        for kind, fields in map(json.loads, lines):
            message: Message = MESSAGES[kind](**fields)
            count = message.fds if isinstance(message, Fork) else 0
            found.append((message, self._fds[:count]))
            del self._fds[:count]
        return found


def _send(end: socket.socket, message: Message, fds: Sequence[int] = ()) -> None:
    data = json.dumps([KINDS[type(message)], asdict(message)]).encode() + b"\n"
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
    """Fork on request, report exits, and kill all workers when the owner is gone."""
    for which in _STOPS:
        signal.signal(which, signal.SIG_IGN)  # the owner ends the nursery, by closing its socket
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
    """Execute the owner's requests. Return False when the owner is gone."""
    messages = lines.receive(owner)
    for message, fds in messages or ():
        if isinstance(message, Signal):
            for pid, number in workers.items():
                if number == message.worker:
                    _kill(pid, message.signal)
            continue
        assert isinstance(message, Fork)
        parent = os.getpid()
        # The nursery ignores these signals. Block them, so that a signal before the worker has handlers is not lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        pid = os.fork()
        if pid == 0:
            for inherited in (owner.fileno(), *wake):
                os.close(inherited)
            _be_worker(parent, message.target, [*message.args, *fds])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
        for fd in fds:
            os.close(fd)
        workers[pid] = message.worker
        _report(owner, Started(message.worker, pid))
    return messages is not None


def _report_exits(owner: socket.socket, workers: dict[int, int]) -> None:
    for pid in list(workers):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            _kill_group(pid)
            _report(owner, Exited(workers.pop(pid), os.waitstatus_to_exitcode(status)))


def _report(owner: socket.socket, message: Message) -> None:
    try:
        _send(owner, message)
    except OSError:
        pass  # the owner is gone, as the next read will find


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
    """Have the kernel kill this process when its parent process dies, on Linux.

    Args:
        parent: the parent's process id, as known before the fork. A parent that has died by now ends this process at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the call above
            os._exit(1)


def _kill(pid: int, which: int) -> None:
    try:
        os.kill(pid, which)
    except ProcessLookupError:
        pass


def _kill_group(leader: int) -> None:
    """Kill the processes that a worker has left in its group. The kernel does not reuse the number of a group that has any."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # macOS: for a group of zombies
        pass


if __name__ == "__main__":
    _serve_and_exit(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), sys.argv[3:])
