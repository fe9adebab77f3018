"""The checks of `syncline doctor` on the broker, in the order in which they depend on each other.

They change nothing: they make and delete a small stream, claim no session and submit no run. With an agent's key one check
tries an operation that the broker must refuse; the broker logs the refusal.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from syncline.bus.address import Server, address_of, masked
from syncline.bus.base import Bus, StreamConfig
from syncline.bus.connect import connect
from syncline.bus.server.accounts import MAX_PAYLOAD_BYTES, SUFFIX, WATCH, public_key_of, read_seed
from syncline.bus.server.operator import in_order
from syncline.bus.server_version import check_version
from syncline.bus.tls import Tls, check_info, unfit
from syncline.chance import new_id
from syncline.client.keys import coordinator_key
from syncline.errors import BrokerFull, BusError, ConfigError, Denied, NoResponders, StreamFull, Unavailable, Unfit
from syncline.wire import subjects
from syncline.wire.chunks import LEAST_PAYLOAD_BYTES
from syncline.wire.messages import Heartbeat, encode
from syncline_cli.doctor.findings import Finding, broken, in_thread, ok, skipped, warning

Role = Literal["coordinator", "watch", "agent", "anybody"]

ANSWER_S = 5.0
SKEW_S = 2.0
SMALL_PAYLOAD_BYTES = 256 << 10
RESERVED_BYTES = 1 << 30  # reserved by a run of some size
MONITOR_PORT = 8222
_KEYS_HINT = "Make a broker's configuration with accounts: syncline keys make DIR"


@dataclass(frozen=True, slots=True)
class Target:
    """The broker to check, and the identity to check it with."""

    url: str
    key: str = ""  # a file, or a directory of them
    name: str = ""
    monitor: str = ""  # the URL of the broker's HTTP pages
    tls: Tls = field(default_factory=Tls)

    def identity(self) -> tuple[str, str, Path | None]:
        """Return name, seed and key file. Raises ConfigError for an invalid key."""
        if not self.key:
            return self.name if self.name not in ("", subjects.AUTO) else "doctor", "", None
        path, name = Path(self.key), self.name
        if path.is_dir():
            names = in_order([file.name.removesuffix(SUFFIX) for file in path.glob(f"*{SUFFIX}")])
            if not names:
                raise ConfigError("--key", f"{path} holds no keys", "Make some: syncline keys add DIR NAME")
            name = names[0] if name in ("", subjects.AUTO) else name
            path = path / f"{name}{SUFFIX}"
        elif name in ("", subjects.AUTO):
            name = path.name.removesuffix(SUFFIX)
        return name, read_seed(path), path


class Broker:
    """The checks of one broker. Each returns a finding; `reachable` and `log_in` come first."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.name, self._seed = "", ""
        self._key_file: Path | None = None
        self.role: Role = "anybody"
        self.bus: Bus | None = None
        self._host = ""  # of the first server that answered
        self._info: dict[str, Any] = {}
        self._varz: dict[str, Any] | None = None
        self._clock: tuple[float, float] | None = None  # seconds that the broker's clock is ahead, and their error

    async def close(self) -> None:
        """End the connection."""
        if self.bus is not None:
            await self.bus.close()

    # -- getting in ----------------------------------------------------------------------------------------------------
    async def reachable(self) -> Finding:
        """Check each server of the address by the greeting that a NATS server sends to every client."""
        try:
            servers = address_of(self.target.url).servers
        except ConfigError as error:
            return broken("broker", error.problem, error.hint)
        found = await asyncio.gather(*(self._look_at(server) for server in servers))
        if len(found) == 1:
            return found[0]
        good = [finding.text for finding in found if finding.verdict == "ok"]
        bad = [finding for finding in found if finding.verdict == "broken"]
        text = "; ".join([*good, *(finding.text for finding in bad)])
        if not bad:
            return ok("broker", text)
        return warning("broker", text, bad[0].hint) if good else broken("broker", text, bad[0].hint)

    async def _look_at(self, server: Server) -> Finding:
        """Check one server."""
        tls, writer = self.target.tls, None
        try:
            began = time.perf_counter()
            async with asyncio.timeout(ANSWER_S):
                reader, writer = await asyncio.open_connection(server.host, server.port)
                line = await reader.readline()
                took_ms = 1000 * (time.perf_counter() - began)
                if not line.startswith(b"INFO {"):
                    hint = "Name the broker's client port, 4222"
                    return broken("broker", f"the program that answers at {server.url} is not a NATS server", hint)
                info = json.loads(line.removeprefix(b"INFO "))
                check_version(info)
                check_info(info, server.scheme == "tls" or tls.given, tls)
                if info.get("tls_required"):
                    await writer.start_tls(tls.context(), server_hostname=server.host)
        except Unfit as error:
            return broken("broker", f"{server.url}: {error.problem}", error.hint)
        except ConfigError as error:
            return broken("broker", f"{error.setting}: {error.problem}", error.hint)
        except (OSError, TimeoutError, ValueError) as error:
            if (why := unfit(error, tls)) is not None:
                return broken("broker", f"{server.url}: {why.problem}", why.hint)
            reason = f"no answer within {ANSWER_S:g} s" if isinstance(error, TimeoutError) else str(error)
            hint = (
                "Start the broker, open its port in the firewall, or name another with --connect or SYNCLINE_NATS_URL"
            )
            return broken("broker", f"no server answers at {server.url}: {reason}", hint)
        finally:
            if writer is not None:
                writer.close()
        if not self._info:
            self._info, self._host = info, server.host
        return ok("broker", f"{server.url} is nats-server {info.get('version')}, {took_ms:.1f} ms away")

    async def log_in(self) -> Finding:
        """Connect with the key."""
        try:
            self.name, self._seed, path = self.target.identity()
            self._key_file = path
            url, tls = self.target.url, self.target.tls
            async with asyncio.timeout(3 * ANSWER_S):
                self.bus = await connect(url, self.name, self._seed, tls=tls, patience_s=1.0)
        except ConfigError as error:
            return broken("key", f"{error.setting}: {error.problem}", error.hint)
        except Denied as error:
            if not self._seed:
                return broken(
                    "key", "the broker asks for a key, and no key file is named", "Name one with --key or SYNCLINE_KEY"
                )
            hint = "Reload the broker's configuration if the key is new; else use a key of this broker's set"
            return broken("key", f"{self.name}: {error}", hint)
        except Unfit as error:
            return broken("key", f"no login: {error.problem}", error.hint)
        except (BusError, TimeoutError) as error:
            return broken("key", f"no login: {str(error) or 'no answer'}", "Look into the broker's log")
        if not self._seed:
            return warning("key", "the broker asks for no key: every client may do everything", _KEYS_HINT)
        self.role = "coordinator" if self.name == subjects.COORDINATOR else "watch" if self.name == WATCH else "agent"
        return ok("key", f"{path} is {self.name}, {public_key_of(self._seed)[:9]}…")

    async def rights(self) -> Finding:
        """Check that the key has the rights of its role, and no others."""
        assert self.bus is not None
        try:
            await self.bus.state(f"KV_{subjects.RUNS_BUCKET}")
            reaches, why = True, ""
        except Denied as error:
            reaches, why = False, str(error)
        except Unavailable as error:
            reaches, why = "JetStream" not in str(error), str(error)
        match self.role:
            case "coordinator" if not reaches:
                return broken(
                    "rights",
                    f"this is not a coordinator's key: {why}",
                    f"Use {coordinator_key(str(self._key_file or ''))}",
                )
            case "coordinator":
                return ok("rights", "those of a coordinator: everything in the account of the runs")
            case "anybody":
                return ok("rights", "everything: this broker has no accounts")
            case _ if reaches:
                text = f"{self.name} may do everything: the key is a coordinator's, or this broker has no accounts"
                return broken("rights", text, _KEYS_HINT)
            case "watch":
                return ok("rights", "those of a reader, which can request and change nothing")
        return await self._rights_of_agent()

    async def _rights_of_agent(self) -> Finding:
        assert self.bus is not None
        try:
            await self.bus.kv_get(subjects.RUNS_BUCKET, subjects.head_key("doctor"))
        except Denied as error:
            hint = f"Use {self.name}'s own key under its own name: --name is {self.name!r}"
            return broken("rights", f"{error}", hint)
        except NoResponders:
            return ok("rights", f"those of agent {self.name} alone; no coordinator has been on this broker yet")
        return ok("rights", f"those of agent {self.name} alone")

    # -- what it offers ------------------------------------------------------------------------------------------------
    async def jetstream(self) -> Finding:
        """Check that the broker and the account have JetStream."""
        hint = "Start nats-server with JetStream: -js, or a jetstream block in its configuration"
        if not self._info.get("jetstream"):
            return broken("jetstream", "the broker stores nothing: JetStream is off", hint)
        if self.role not in ("coordinator", "anybody"):
            return ok("jetstream", "on")
        assert self.bus is not None
        try:
            await self.bus.state(f"KV_{subjects.RUNS_BUCKET}")
        except Unavailable as error:
            if "JetStream" in str(error):
                return broken(
                    "jetstream", "on, but not for this account", "Write `jetstream: enabled` into the account CORE"
                )
        return ok("jetstream", "on")

    async def payload(self) -> Finding:
        """Check the largest message."""
        size = int(self._info.get("max_payload", 0))
        text = f"messages of up to {size >> 10} KiB"
        hint = f"Set max_payload: {MAX_PAYLOAD_BYTES} in the broker's configuration, on every server alike"
        if size < LEAST_PAYLOAD_BYTES:
            return broken("payload", f"{text}: a run needs {LEAST_PAYLOAD_BYTES >> 10} KiB at least", hint)
        if size < SMALL_PAYLOAD_BYTES:
            least = f"the minimum is {LEAST_PAYLOAD_BYTES >> 10} KiB"
            return warning("payload", f"{text}: models travel in small chunks ({least})", hint)
        return ok("payload", text)

    async def space(self) -> Finding:
        """Check the free space of the store, by the broker's HTTP pages, else by reserving some of it."""
        if self.role in ("coordinator", "anybody"):
            try:
                async with self._stream(1 << 20):
                    pass
            except BrokerFull as error:
                return broken("space", f"the broker stores nothing: {error}", error.hint)
            except StreamFull:
                pass  # told below, with figures where they can be seen
        pages = await self._monitor("jsz")
        if pages is not None and "config" in pages:
            return space_finding(
                pages["config"].get("max_storage", 0), pages.get("reserved_storage", 0), pages.get("storage", 0)
            )
        if self.role not in ("coordinator", "anybody"):
            return skipped("space", "needs a coordinator's key, or --monitor")
        try:
            async with self._stream(RESERVED_BYTES):
                return ok("space", f"{RESERVED_BYTES >> 30} GiB or more can be reserved")
        except StreamFull:
            text = f"less than {RESERVED_BYTES >> 30} GiB can be reserved in the broker's store"
            return warning("space", text, "Give JetStream more room (max_file_store), or delete runs that have ended")

    async def clock(self) -> Finding:
        """Compare the clocks. Rounds use the broker's clock alone; this machine's serves logs and certificates."""
        await self._monitor("varz")
        if self._clock is None and self.role in ("coordinator", "anybody"):
            assert self.bus is not None
            async with self._stream(1 << 20) as subject:
                before = time.time()
                await self.bus.put(subject, b"now")
                after = time.time()
                stored = await self.bus.get(_stream_of(subject), subject)
            if stored is not None:
                self._clock = (stored.time_s - (before + after) / 2, (after - before) / 2)
        if self._clock is None:
            return skipped("clock", "needs a coordinator's key, or --monitor")
        return clock_finding(*self._clock)

    async def coordinator(self) -> Finding:
        """Check that a coordinator answers."""
        assert self.bus is not None
        if self.role == "watch":
            return skipped("coordinator", "a reader's key can send no requests")
        if self.role == "agent":  # a heartbeat of an unknown session is answered and ignored
            beat = Heartbeat(session=new_id(), clock=0, progress=0)
            subject, question = subjects.heartbeat("doctor", self.name), encode(beat)
        else:  # an empty submission is refused, and a refusal is an answer
            subject, question = subjects.submit(), b""
        try:
            began = time.perf_counter()
            await self.bus.request(subject, question, ANSWER_S)
        except NoResponders:
            key = coordinator_key(str(self._key_file or ""))
            hint = f"Start one: syncline coordinator --connect {masked(self.target.url)}" + (
                f" --key {key}" if self._seed else ""
            )
            return broken("coordinator", "no coordinator is on this broker", hint)
        except Denied as error:
            return broken("coordinator", str(error), "Use a key of this broker's set, under its own name")
        return ok("coordinator", f"answers within {1000 * (time.perf_counter() - began):.1f} ms")

    # -- helpers -------------------------------------------------------------------------------------------------------
    @asynccontextmanager
    async def _stream(self, max_bytes: int) -> AsyncIterator[str]:
        """Make a stream for the duration of the context; yield its subject."""
        assert self.bus is not None
        subject = f"{subjects.PREFIX}.doctor-{secrets.token_hex(6)}.probe"
        config = StreamConfig(_stream_of(subject), (subject,), max_bytes)
        try:
            await self.bus.ensure_stream(config)
            yield subject
        finally:
            await self.bus.delete_stream(config.name)

    async def _monitor(self, page: str) -> dict[str, Any] | None:
        """Return one of the server's HTTP pages; None if this machine cannot read them."""
        base = self.target.monitor or f"http://{_bracketed(self._host)}:{MONITOR_PORT}"
        before = time.time()
        try:
            found = await in_thread(lambda: _read_json(f"{base.rstrip('/')}/{page}"), 2.0)
        except (OSError, TimeoutError, ValueError):
            return None
        after = time.time()
        if found.get("server_id") != self._info.get("server_id"):
            return None  # the page is another server's, behind the same address
        if page == "varz" and isinstance(found.get("now"), str):
            self._clock = (
                datetime.fromisoformat(found["now"]).timestamp() - (before + after) / 2,
                (after - before) / 2,
            )
        return found


def space_finding(limit: int, reserved: int, used: int) -> Finding:
    """Judge the store's space, in bytes."""
    free = limit - max(reserved, used)
    text = f"{free / 2**30:.1f} of {limit / 2**30:.1f} GiB (max_file_store) are free, {used / 2**30:.2f} used"
    if free < RESERVED_BYTES:
        return warning("space", text, "Give JetStream more room (max_file_store), or delete runs that have ended")
    return ok("space", text)


def clock_finding(skew_s: float, error_s: float) -> Finding:
    """Judge the clocks.

    Args:
        skew_s: seconds that the broker's clock is ahead of this machine's.
        error_s: error of `skew_s`.
    """
    if abs(skew_s) - error_s > SKEW_S:
        side = "behind" if skew_s > 0 else "ahead of"
        text = f"this machine's clock is {abs(skew_s):.1f} s {side} the broker's"
        return warning("clock", text, "Synchronise both, with chrony or systemd-timesyncd; rounds do not depend on it")
    return ok("clock", f"within {1000 * (abs(skew_s) + error_s):.1f} ms of the broker's")


def _stream_of(subject: str) -> str:
    return f"SYNCLINE_DOCTOR_{subject.split('.')[2]}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _read_json(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=1.5) as page:
        found = json.loads(page.read(4 << 20))
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found
