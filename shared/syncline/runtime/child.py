"""A child process that does the heavy work of a service. Questions travel over a socket; tensors are in shared memory.

The service stays responsive during all work of the child: a step that holds the interpreter, crashes or is killed for memory
stops neither heartbeats nor Ctrl-C. `syncline.runtime.child_messages` has the questions and answers.

On the socket each message is a length (four bytes, little endian) and a record of that length.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from syncline.errors import ConfigError, PeerError, SynclineError
from syncline.runtime.child_messages import A, Answer, Doing, Failed, Message, Question, decode, encode, sendable
from syncline.runtime.nursery import Nursery, NurseryDied, Worker
from syncline.shm import SharedMemory

EXTERNAL_SIGNALS = frozenset(
    {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
)  # no fault of the child's code raises these
OUT_OF_MEMORY = "the kernel does so when memory runs out, see `dmesg`: lower local.batch_size or add memory"
MOST_DOING_CHARS = 200
MOST_PROBLEM_CHARS = 1000
_LENGTH = struct.Struct("<I")

Handler = Callable[[Any], Answer]
Handlers = Mapping[
    type[Question[Any]], Handler
]  # each takes the question of its type and returns that question's answer


@dataclass(frozen=True, slots=True)
class Chore:
    """Work of a child for the time in which no question waits.

    Attributes:
        due_in_s: returns the seconds until the work is due, at most 0 if it is due now; None: no work.
        do: does the work. Afterwards `due_in_s` returns None or a later time.
    """

    due_in_s: Callable[[], float | None]
    do: Callable[[], None]


class ChildDied(SynclineError):
    """The process has ended, with the reason; its memory is lost.

    Attributes:
        from_outside: another process or the kernel ended it, so that its code may be right.
    """

    def __init__(self, why: str, *, from_outside: bool = False) -> None:
        self.from_outside = from_outside
        super().__init__(why)


class ChildFailed(SynclineError):
    """The child answered with an error. `config` is set if the user's input caused the error, and not the child's code."""

    def __init__(self, problem: str, *, setting: str = "", hint: str = "") -> None:
        self.setting = setting
        self.problem = problem
        self.hint = hint
        super().__init__(f"{setting}: {problem}. {hint}" if setting else problem)

    @property
    def config(self) -> ConfigError | None:
        return ConfigError(self.setting, self.problem, self.hint) if self.setting else None


class Asked(Protocol):
    """A child as a service sees it: a process, or in a simulation the same code inline."""

    doing: str  # as the child has said while it answers, for people; '' before it says anything

    async def ask(self, question: Question[A]) -> A:
        """Return the answer. Raises ChildFailed for an error in the child, ChildDied when the child has ended."""
        ...

    async def close(self) -> None: ...


Start = Callable[[SharedMemory], Awaitable[Asked]]  # starts a child that shares this memory


class Child:
    """The service's side of a child process: one question at a time."""

    def __init__(self, worker: Worker, end: socket.socket) -> None:
        self.worker = worker
        self.doing = ""
        self._end = end
        self._lock = asyncio.Lock()

    @classmethod
    async def start(cls, nursery: Nursery, target: str, memory: SharedMemory, *args: Any) -> Child:
        """Fork `target(*args, socket_fd, memory_fd)`. Raises NurseryDied."""
        ours, theirs = socket.socketpair()
        try:
            worker = await nursery.fork(target, *args, fds=[theirs.fileno(), memory.fd])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        return cls(worker, ours)

    async def ask(self, question: Question[A]) -> A:
        """Return the answer. Raises ChildFailed for an error in the child, ChildDied when the child has ended."""
        async with self._lock:
            self.doing = ""
            exchange = asyncio.ensure_future(self._exchange(question))
            try:  # wait for the exit too: a process that the child has forked may live on and hold the socket open
                await asyncio.wait((exchange, self.worker.exited), return_when=asyncio.FIRST_COMPLETED)
            finally:
                exchange.cancel()
                await asyncio.gather(exchange, return_exceptions=True)
            if exchange.cancelled() or isinstance(exchange.exception(), OSError | EOFError):
                raise self._obituary(await self.worker.exited)
            return exchange.result()

    async def close(self) -> None:
        """Kill the process and the processes that it has forked, and wait for its end."""
        try:
            self.worker.signal(signal.SIGKILL)
            await self.worker.exited
        except NurseryDied:
            pass
        self._end.close()

    async def _exchange(self, question: Question[A]) -> A:
        data = encode(question)
        await asyncio.get_running_loop().sock_sendall(self._end, _LENGTH.pack(len(data)) + data)
        while True:
            (size,) = _LENGTH.unpack(await self._receive(_LENGTH.size))
            message = answer_in(await self._receive(size), question)
            if not isinstance(message, Doing):
                return message
            self.doing = message.text

    async def _receive(self, size: int) -> bytes:
        loop = asyncio.get_running_loop()
        parts = []
        missing = size
        while missing:
            part = await loop.sock_recv(self._end, min(missing, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def _obituary(self, code: int) -> ChildDied:
        if code >= 0:
            return ChildDied(f"process {self.worker.pid} exited with code {code}")
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        hint = f" ({OUT_OF_MEMORY})" if -code == signal.SIGKILL else ""
        text = f"process {self.worker.pid} was killed by {name}{hint}"
        return ChildDied(text, from_outside=-code in EXTERNAL_SIGNALS)


def answer_in(data: bytes, question: Question[A]) -> A | Doing:
    """Return the child's answer or report. Raises ChildFailed for an error, and for data that do not answer the question."""
    try:
        message = decode(data, question.answer, Failed, Doing)
    except ValueError as error:
        raise ChildFailed(f"the answer to {question.kind!r} cannot be read: {error}") from None
    if isinstance(message, Failed):
        raise ChildFailed(message.problem, setting=message.setting, hint=message.hint)
    return cast(A | Doing, message)


# -- the child's side ------------------------------------------------------------------------------------------------------
def serve(end_fd: int, handlers: Handlers, chore: Chore | None = None) -> int:
    """Answer questions until the service hangs up. Returns the exit code.

    Args:
        end_fd: the child's end of the socket; closed at the end.
        handlers: by type of question.
        chore: work for the time in which no question waits.
    """
    with socket.socket(fileno=end_fd) as end:
        end.setblocking(True)
        while (question := _next_question(end, chore)) is not None:
            data = answered(handlers, question)
            try:
                end.sendall(_LENGTH.pack(len(data)) + data)
            except OSError:
                return 0
    return 0


def tell(end_fd: int, doing: str) -> None:
    """Report the child's present work to the service, before the answer. `end_fd`: the same as for `serve`."""
    data = encode(Doing(text=doing[:MOST_DOING_CHARS]))
    try:
        os.write(end_fd, _LENGTH.pack(len(data)) + data)  # whole: the socket blocks
    except OSError:
        pass  # the service has hung up


def answered(handlers: Handlers, question: bytes) -> bytes:
    """Return the answer as it travels: `Failed` for anything that the user's code raises or that cannot be sent."""
    message = _answer(handlers, question)
    try:
        return encode(message)
    except Exception as error:  # an integer beyond 64 bits, for example
        return encode(Failed(problem=f"the answer {message.kind!r} cannot be sent: {_text_of(error)}"))


def _answer(handlers: Handlers, data: bytes) -> Message:
    try:
        question = decode(data, *handlers)
        return handlers[type(question)](question)  # type: ignore[index]
    except ConfigError as error:
        return Failed(problem=error.problem, setting=error.setting, hint=error.hint)
    except PeerError as error:
        return Failed(problem=_text_of(error))
    except Exception as error:
        traceback.print_exc()
        return Failed(problem=described(error))


def described(error: Exception) -> str:
    """Return an error of the user's code for people: the error, the line that raised it, and its notes with a hint."""
    if isinstance(error, ConfigError):
        return sendable(str(error))
    notes = "".join(f". {note}" for note in dict.fromkeys(getattr(error, "__notes__", ())))
    return sendable(f"{type(error).__name__}: {_text_of(error)} ({_place_of(error)}){notes}")


def _place_of(error: Exception) -> str:
    """Return the last line of the user's code in the traceback; the last line of any code if the user's has no part in it."""
    lines = [(frame, number) for frame, number in traceback.walk_tb(error.__traceback__)]
    theirs = [line for line in lines if _is_users(line[0].f_globals.get("__name__", ""))]
    frame, number = (theirs or lines)[-1]
    return f"{Path(frame.f_code.co_filename).name}:{number}"


def _is_users(module: str) -> bool:
    """Return whether the code of a module is the user's. The ready-made tasks count, as examples that users start from."""
    root = module.partition(".")[0]
    ours = root.startswith("syncline") and (not module.startswith("syncline.tasks.") or module.endswith(".base"))
    return not (ours or root in sys.stdlib_module_names or root in ("torch", "numpy"))


def _text_of(error: Exception) -> str:
    try:
        return sendable(str(error)[:MOST_PROBLEM_CHARS])
    except Exception as worse:  # the error's class is the user's
        return f"which cannot say more, as its __str__ raises {type(worse).__name__}"


def _next_question(end: socket.socket, chore: Chore | None) -> bytes | None:
    """Wait for a question and do the chore meanwhile; None when the service has hung up."""
    while chore is not None and (due_in_s := chore.due_in_s()) is not None:
        readable, _, _ = select.select([end], [], [], max(0.0, due_in_s))
        if readable:  # a question, or the end
            break
        chore.do()
    return _read(end)


def _read(end: socket.socket) -> bytes | None:
    """Return the next message, or None when the service has hung up."""
    header = _read_exactly(end, _LENGTH.size)
    if header is None:
        return None
    (size,) = _LENGTH.unpack(header)
    return _read_exactly(end, size)


def _read_exactly(end: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        try:
            part = end.recv(size - len(data))
        except OSError:
            return None
        if not part:
            return None
        data += part
    return bytes(data)
