"""A child process that does the heavy work of a service: asked over a socket, with its tensors in shared memory.

The service stays responsive whatever the child does: a step that holds the interpreter, crashes or is killed for memory
stops neither heartbeats nor Ctrl-C.
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
from typing import Any, Protocol

import msgpack

from syncline.errors import ConfigError, PeerError, SynclineError
from syncline.runtime.nursery import Nursery, NurseryDied, Worker
from syncline.shm import SharedMemory

FROM_OUTSIDE = frozenset(
    {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
)  # no fault of the code raises these
OUT_OF_MEMORY = "the kernel does so when memory runs out, see `dmesg`: lower local.batch_size or add memory"
MAX_MESSAGE_BYTES = 64 << 20  # a manifest of a very large model, with room
_LENGTH = struct.Struct("<I")
_DOING = "doing"  # the one key of what is no answer yet

Handler = Callable[..., dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Chore:
    """Work that a child does while no question waits for it.

    Attributes:
        due_in_s: Returns the seconds until the work is due, at most 0 where it is due now, or None where there is none.
        do: Does the work. Afterwards there is none, or it is due later.
    """

    due_in_s: Callable[[], float | None]
    do: Callable[[], None]


class ChildDied(SynclineError):
    """The process is gone, with the reason; what it held is lost. `from_outside`: another process or the kernel ended it."""

    def __init__(self, why: str, *, from_outside: bool = False) -> None:
        self.from_outside = from_outside
        super().__init__(why)


class ChildFailed(SynclineError):
    """The child answered with an error. `config`: the user's input is at fault; else its code."""

    def __init__(self, problem: str, *, setting: str = "", hint: str = "") -> None:
        self.setting, self.problem, self.hint = setting, problem, hint
        super().__init__(f"{setting}: {problem}. {hint}" if setting else problem)

    @property
    def config(self) -> ConfigError | None:
        return ConfigError(self.setting, self.problem, self.hint) if self.setting else None


class Asked(Protocol):
    """What a service needs of a child: a process, or in a simulation the same code inline."""

    doing: str  # as it has said while it answers, for people; '' where it has not

    async def ask(self, question: str, **fields: Any) -> dict[str, Any]:
        """The answer. Raises ChildFailed for an error in the child, ChildDied when it is gone."""
        ...

    async def close(self) -> None: ...


Start = Callable[[SharedMemory], Awaitable[Asked]]  # a child that shares this memory


class Child:
    """The service's side of a process: one question at a time."""

    def __init__(self, worker: Worker, end: socket.socket) -> None:
        self.worker = worker
        self._end = end
        self._lock = asyncio.Lock()
        self.doing = ""

    @classmethod
    async def start(cls, nursery: Nursery, target: str, memory: SharedMemory, *args: Any) -> Child:
        """Forks `target(*args, socket_fd, memory_fd)`."""
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

    async def ask(self, question: str, **fields: Any) -> dict[str, Any]:
        """The answer. Raises ChildFailed for an error in the child, ChildDied when it is gone."""
        data = msgpack.packb({"ask": question, **fields})
        async with self._lock:
            self.doing = ""
            exchange = asyncio.ensure_future(self._exchange(_LENGTH.pack(len(data)) + data))
            try:  # its end says so first: a process that it forked may live on, and hold the socket open
                await asyncio.wait((exchange, self.worker.exited), return_when=asyncio.FIRST_COMPLETED)
            finally:
                exchange.cancel()
                await asyncio.gather(exchange, return_exceptions=True)
            if exchange.cancelled() or isinstance(exchange.exception(), OSError | EOFError):
                raise self._obituary(await self.worker.exited)
            answer = exchange.result()
        if "error" in answer:
            raise ChildFailed(answer["error"], setting=answer.get("setting", ""), hint=answer.get("hint", ""))
        return answer

    async def close(self) -> None:
        """Kills the process, and what it has forked, and waits for its end."""
        try:
            self.worker.signal(signal.SIGKILL)
            await self.worker.exited
        except NurseryDied:
            pass
        self._end.close()

    async def _exchange(self, question: bytes) -> dict[str, Any]:
        await asyncio.get_running_loop().sock_sendall(self._end, question)
        while True:
            (size,) = _LENGTH.unpack(await self._receive(_LENGTH.size))
            answer: dict[str, Any] = msgpack.unpackb(await self._receive(size), strict_map_key=False)
            if answer.keys() != {_DOING}:
                return answer
            self.doing = answer[_DOING]

    async def _receive(self, size: int) -> bytes:
        loop, parts, missing = asyncio.get_running_loop(), [], size
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
        return ChildDied(text, from_outside=-code in FROM_OUTSIDE)


def serve(end_fd: int, handlers: Mapping[str, Handler], chore: Chore | None = None) -> int:
    """The child's side: answers until the service hangs up. Returns the exit code."""
    with socket.socket(fileno=end_fd) as end:
        end.setblocking(True)
        while (question := _next_question(end, chore)) is not None:
            data = packed_answer(handlers, question)
            try:
                end.sendall(_LENGTH.pack(len(data)) + data)
            except OSError:
                return 0
    return 0


def tell(end_fd: int, doing: str) -> None:
    """Tell the service what the child is doing, before it answers. `end_fd`: the same as for `serve`."""
    data = msgpack.packb({_DOING: _clean(doing[:200])})
    try:
        os.write(end_fd, _LENGTH.pack(len(data)) + data)  # whole: the socket blocks
    except OSError:
        pass  # the service has hung up


def packed_answer(handlers: Mapping[str, Handler], question: dict[str, Any]) -> bytes:
    """What travels to the service: in any case an answer, whatever the user's code returned or raised."""
    asked, said = str(question.get("ask")), answer(handlers, question)
    try:
        return bytes(msgpack.packb(said))
    except Exception as error:  # it is no answer that can be sent
        return bytes(msgpack.packb({"error": f"what {asked!r} came to cannot be sent: {_told(error)}"}))


def answer(handlers: Mapping[str, Handler], question: dict[str, Any]) -> dict[str, Any]:
    try:
        return handlers[question.pop("ask")](**question)
    except ConfigError as error:
        return {"error": _clean(error.problem), "setting": _clean(error.setting), "hint": _clean(error.hint)}
    except PeerError as error:
        return {"error": _told(error)}
    except Exception as error:
        traceback.print_exc()
        return {"error": described(error)}


def described(error: Exception) -> str:
    """Return what the user's code raised as people read it: the error, the line that raised it, and notes with a hint."""
    if isinstance(error, ConfigError):
        return _clean(str(error))
    notes = "".join(f". {note}" for note in dict.fromkeys(getattr(error, "__notes__", ())))
    return _clean(f"{type(error).__name__}: {_told(error)} ({_where(error)}){notes}")


def _where(error: Exception) -> str:
    """The last line of the user's code on the way to it; of anybody's, where there is none."""
    lines = [(frame, number) for frame, number in traceback.walk_tb(error.__traceback__)]
    theirs = [line for line in lines if _is_users(line[0].f_globals.get("__name__", ""))]
    frame, number = (theirs or lines)[-1]
    return f"{Path(frame.f_code.co_filename).name}:{number}"


def _is_users(module: str) -> bool:
    root = module.partition(".")[0]
    ours = root.startswith("syncline") and (not module.startswith("syncline.tasks.") or module.endswith(".base"))
    return not (ours or root in sys.stdlib_module_names or root in ("torch", "numpy"))


def _told(error: Exception) -> str:
    """What it says; a class of the user's may not even do that."""
    try:
        return _clean(str(error)[:1000])
    except Exception as worse:
        return f"which cannot say more, as its __str__ raises {type(worse).__name__}"


def _clean(text: str) -> str:
    """As UTF-8 can hold it: names of files may bring anything."""
    return text.encode(errors="replace").decode()


def _next_question(end: socket.socket, chore: Chore | None) -> dict[str, Any] | None:
    """Wait for a question, and do the chore while there is none; None where the service has hung up."""
    while chore is not None and (due_in_s := chore.due_in_s()) is not None:
        readable, _, _ = select.select([end], [], [], max(0.0, due_in_s))
        if readable:  # a question, or the end
            break
        chore.do()
    return _read(end)


def _read(end: socket.socket) -> dict[str, Any] | None:
    header = _read_exactly(end, _LENGTH.size)
    if header is None:
        return None
    (size,) = _LENGTH.unpack(header)
    data = _read_exactly(end, size)
    if data is None:
        return None
    question: dict[str, Any] = msgpack.unpackb(data, max_bin_len=MAX_MESSAGE_BYTES, strict_map_key=False)
    return question


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
