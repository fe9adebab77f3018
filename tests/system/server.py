"""A nats-server as an operator runs it: from a configuration file, reloaded by signals. The test that starts it ends it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from syncline.bus.server.process import server_binary
from system.command import until

READY_S = 20.0


class Server:
    """`with Server(config, log):` runs `nats-server -c config`. `enter`: the words before that command."""

    def __init__(self, config: Path, log: Path, enter: Sequence[str] = ()) -> None:
        self.config, self.log, self._enter = config, log, enter

    def __enter__(self) -> Self:
        with self.log.open("ab") as out:
            command = [*self._enter, str(server_binary()), "-c", str(self.config)]
            self.process = subprocess.Popen(command, stderr=out, stdout=out)
        until(lambda: "Server is ready" in self.text or self._ended(), READY_S, lambda: self.text)
        assert not self._ended(), self.text
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it; what is ended already is no error."""
        self.process.terminate()
        try:
            self.process.wait(10)
        finally:
            self.process.kill()

    @property
    def text(self) -> str:
        return self.log.read_text()

    def reload(self) -> None:
        """As `nats-server --signal reload` does; returns when it is done."""
        before = self.text.count("Reloaded server configuration")
        os.kill(self.process.pid, signal.SIGHUP)
        until(lambda: self.text.count("Reloaded server configuration") > before, READY_S, lambda: self.text)

    def _ended(self) -> bool:
        return self.process.poll() is not None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
