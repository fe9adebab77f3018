"""compose.yaml without a container engine: the same commands, environments, health checks and order, as local processes.

What a container would change is translated, and nothing else:

* **Paths.** A service has a root directory of its own. In it every volume is a link to one directory for all services, a
  bind mount a link into the repository; a path in a command or a variable is taken from there. What a service does not
  mount, it does not see.
* **Addresses.** `nats:4222` and `0.0.0.0:4222` are a free port of 127.0.0.1, `127.0.0.1:8222` another.
* **Programs.** The image `nats` is nats-server as it is installed here; the entry point `syncline` of our own image is this
  interpreter's; `wget URL` in a health check is the same request in Python, for images have it and machines may not.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from syncline.bus.server.process import server_binary
from system.command import until
from system.dockerfile import ROOT, environment, exec_form, only
from system.server import free_port

PATIENCE_S = 90.0
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
_GET = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=4)"


def load(*names: str, variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The file with its variables filled in, and with those that override it merged in as Compose does: maps are merged, lists
    of volumes joined."""
    merged: dict[str, Any] = {}
    for name in names or ("compose.yaml",):
        merged = _merge(merged, yaml.safe_load((ROOT / name).read_text()))
    filled: dict[str, Any] = _filled(merged, variables or {})
    return filled


def _merge(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return {key: _merge(below.get(key), above.get(key)) for key in [*below, *(k for k in above if k not in below)]}
    if isinstance(below, list) and isinstance(above, list):
        return [*below, *above]
    return below if above is None else above


def _filled(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner, variables) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, variables) for inner in value]
    if isinstance(value, str):
        return _VARIABLE.sub(lambda found: variables.get(found[1]) or found[2] or "", value)
    return value


@dataclass
class Replica:
    """One container, as a process."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text()

    def says(self, words: str) -> None:
        def said() -> bool:
            return words in self.text or self.process.poll() is not None

        until(said, PATIENCE_S, lambda: f"not a word of {words!r}: {self.text}")
        assert words in self.text, self.text

    def stop(self, within_s: float = 30.0) -> int:
        """As the engine does: SIGTERM, and the grace period."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within_s)


class Composition:
    """`with Composition(place) as it: it.up(...)`; at the end everything is stopped, and must have stopped by itself."""

    def __init__(self, place: Path, **variables: str) -> None:
        self.place = place
        self.services: dict[str, Any] = load(variables=variables)["services"]
        self.running: dict[str, list[Replica]] = {}
        self.port, self._monitor = free_port(), free_port()
        self._started: list[Replica] = []

    def __enter__(self) -> Composition:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.down()
        finally:
            for replica in self._started:
                replica.process.kill()
                replica.process.wait()

    # -- up and down ---------------------------------------------------------------------------------------------------
    def up(self, *names: str, scale: Mapping[str, int] | None = None) -> None:
        """Starts these services, or all that have no profile, each after what it depends on."""
        for name in names or [name for name, service in self.services.items() if "profiles" not in service]:
            self._up(name, scale or {})

    def _up(self, name: str, scale: Mapping[str, int]) -> None:
        if name in self.running:
            return
        for other, need in self.services[name].get("depends_on", {}).items():
            self._up(other, scale)
            if need["condition"] == "service_completed_successfully":
                replica = self.running[other][0]
                assert replica.process.wait(PATIENCE_S) == 0, replica.text
            else:
                assert need["condition"] == "service_healthy"
                self._until_healthy(other)
        count = scale.get(name, self.services[name].get("deploy", {}).get("replicas", 1))
        self.running[name] = [self.start(name) for _ in range(count)]

    def down(self) -> dict[str, list[int]]:
        """Stops everything, the last first; the exit codes."""
        codes = {}
        for name in reversed(list(self.running)):
            codes[name] = [replica.stop() for replica in self.running.pop(name)]
        return codes

    def start(self, name: str) -> Replica:
        """One more replica."""
        service, root = self.services[name], self._root(name)
        number = len(self._started)
        log = self.place / f"{name}-{number}.log"
        temporary = root / f"tmp-{number}"
        temporary.mkdir()
        given = environment() if "build" in service else {}
        given |= service.get("environment", {})
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("SYNCLINE_", "PYTEST"))}
        variables |= {k: self._translated(name, str(v)) for k, v in given.items() if k != "PATH"}
        with log.open("wb") as out:
            process = subprocess.Popen(
                self._command(name, service["command"]),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=root / "runs" if (root / "runs").exists() else root,
                env={"TMPDIR": str(temporary), **variables},
            )
        self._started.append(Replica(process, log))
        return self._started[-1]

    def _until_healthy(self, name: str) -> None:
        """Runs the service's own health check until it is content."""
        test = self.services[name]["healthcheck"]["test"]
        assert test[0] == "CMD", "no shell in between"
        replica = self.running[name][0]
        variables = self.services[name].get("environment", {})
        environ = {**os.environ, **{k: self._translated(name, v) for k, v in variables.items()}}
        deadline = time.monotonic() + PATIENCE_S
        while True:
            done = subprocess.run(self._test(name, test[1:]), env=environ, capture_output=True, text=True, timeout=60)
            if done.returncode == 0:
                return
            story = f"{name} is not healthy: {done.stdout}{done.stderr}{replica.text}"
            assert replica.process.poll() is None and time.monotonic() < deadline, story
            time.sleep(0.2)

    # -- translation ---------------------------------------------------------------------------------------------------
    def _command(self, name: str, words: list[str]) -> list[str]:
        program = [str(server_binary())] if self.services[name]["image"].startswith("nats:") else self._syncline()
        return [*program, *(self._translated(name, word) for word in words)]

    def _test(self, name: str, words: list[str]) -> list[str]:
        translated = [self._translated(name, word) for word in words]
        if words[0] == "wget":
            return [sys.executable, "-c", _GET, translated[-1]]
        assert words[0] == "syncline"
        return [*self._syncline(), *translated[1:]]

    @staticmethod
    def _syncline() -> list[str]:
        assert exec_form(only("ENTRYPOINT")) == ["syncline"]
        return [sys.executable, "-m", "syncline_cli"]

    def _translated(self, name: str, text: str) -> str:
        for there in ("nats:4222", "0.0.0.0:4222"):
            text = text.replace(there, f"127.0.0.1:{self.port}")
        text = text.replace("127.0.0.1:8222", f"127.0.0.1:{self._monitor}")
        tops = {target.split("/")[1] for _, target in self._mounts(name)} | {"runs"}
        return re.sub(rf"(?<![\w./])/({'|'.join(tops)})(?=/|$)", rf"{self._root(name)}/\1", text)

    def _mounts(self, name: str) -> list[tuple[str, str]]:
        """Source and target of every volume."""
        return [(parts[0], parts[1]) for parts in (v.split(":") for v in self.services[name].get("volumes", []))]

    def _root(self, name: str) -> Path:
        root = self.place / "roots" / name
        if not root.exists():
            root.mkdir(parents=True)
            for source, target in self._mounts(name):
                volume = (ROOT / source) if source.startswith(".") else self.volume(source)
                at = root / target.removeprefix("/")
                at.parent.mkdir(parents=True, exist_ok=True)
                at.symlink_to(volume, target_is_directory=True)
        return root

    def volume(self, name: str) -> Path:
        directory = self.place / "volumes" / name
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return directory
