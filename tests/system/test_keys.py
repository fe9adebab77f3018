"""Keys with a real nats-server: an added agent gets in by reloading, a revoked one is out at once and stays out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from syncline.bus.base import Delivery
from syncline.bus.nats.bus import NatsBus
from syncline.bus.nats.lane import Connection
from syncline.bus.server.accounts import Identity
from syncline.bus.server.operator import OperatorSet
from syncline.errors import BusError, Denied, Unavailable
from syncline.wire import subjects
from system.command import Command, until
from system.server import Server, free_port

pytestmark = pytest.mark.timeout(120)


class Operator:
    """Somebody who uses the command, and a broker that runs with what it writes."""

    def __init__(self, place: Path) -> None:
        self.place, self.port = place, free_port()
        self.syncline("make", "ops", "--agents", "2", "--listen", f"127.0.0.1:{self.port}", "--monitor", "")
        self.keys = OperatorSet(place / "ops")
        self.server = Server(self.keys.config, place / "broker.log")

    def syncline(self, *args: str) -> str:
        command = Command(self.place, ("keys", *args))
        try:
            assert command.ended(60.0) == 0, command.err
            return command.out
        finally:
            command.stop()

    async def connect(self, who: str | Identity, scheme: str = "nats") -> NatsBus:
        identity = self.keys.keyring.identity(who) if isinstance(who, str) else who
        url = f"{scheme}://127.0.0.1:{self.port}"
        return await NatsBus.connect(Connection(url, identity.name, identity.seed, patience_s=2.0))


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[Operator]:
    made = Operator(tmp_path)
    with made.server:
        yield made


async def answered(bus: NatsBus, agent: str, within_s: float) -> bool:
    """Whether the coordinator hears the agent, and the agent its answer."""
    try:
        return await bus.request(subjects.hello(agent), b"hello", within_s) == b"welcome"
    except BusError:
        return False


async def coordinator(operator: Operator) -> NatsBus:
    bus = await operator.connect("coordinator")

    async def welcome(delivery: Delivery) -> None:
        await bus.publish(delivery.reply, b"welcome")

    await bus.subscribe(f"{subjects.PREFIX}.*.agent.*.hello", welcome)
    return bus


async def test_an_added_agent_is_heard_after_two_reloads_and_nobody_is_disconnected(operator: Operator) -> None:
    core, first = await coordinator(operator), await operator.connect("a1")
    dropped: list[str] = []
    core.when_reconnected(lambda: dropped.append("coordinator"))
    first.when_reconnected(lambda: dropped.append("a1"))
    assert await answered(first, "a1", 5.0)
    operator.syncline("add", "ops", "late")
    with pytest.raises(Denied):
        await operator.connect("late")
    operator.server.reload()
    operator.server.reload()
    late = await operator.connect("late")
    assert await answered(late, "late", 5.0)
    assert await answered(first, "a1", 5.0) and dropped == []
    for bus in (core, first, late):
        await bus.close()


async def test_a_revoked_agent_is_thrown_out_and_never_comes_in_again(operator: Operator) -> None:
    core, stays, thief = await coordinator(operator), await operator.connect("a1"), await operator.connect("a2")
    stolen = operator.keys.keyring.identity("a2")
    assert await answered(stays, "a1", 5.0) and await answered(thief, "a2", 5.0)
    operator.syncline("revoke", "ops", "a2")
    assert await answered(thief, "a2", 5.0), "until the broker reloads, nothing has changed"
    operator.server.reload()
    assert not await answered(thief, "a2", 1.0)
    with pytest.raises(Denied):
        await operator.connect(stolen)
    assert await answered(stays, "a1", 5.0)
    operator.syncline("add", "ops", "a2")
    operator.server.reload()
    operator.server.reload()
    with pytest.raises(Denied):
        await operator.connect(stolen)
    again = await operator.connect(Identity.of("a2", (operator.place / "ops/agents/a2.nk").read_text().strip()))
    assert await answered(again, "a2", 5.0)
    for bus in (core, stays, thief, again):
        await bus.close()


async def test_the_operators_own_settings_survive_every_change(operator: Operator) -> None:
    config = operator.keys.config
    config.write_text(config.read_text() + "max_connections: 77\n")
    operator.syncline("add", "ops", "late")
    operator.server.reload()
    assert config.read_text().endswith("max_connections: 77\n")
    bus = await operator.connect("late")
    await bus.close()


@pytest.fixture
def with_tls(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> str:
    """The `tls` block of a broker whose authority is the tests' own; in the configuration it is not yet."""
    authority, certificate, key = (operator.place / name for name in ("authority.pem", "certificate.pem", "key.pem"))
    ours = trustme.CA()
    issued = ours.issue_cert("127.0.0.1")
    ours.cert_pem.write_to_path(str(authority))
    issued.cert_chain_pems[0].write_to_path(str(certificate))
    issued.private_key_pem.write_to_path(str(key))
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    return f'tls {{ cert_file: "{certificate}", key_file: "{key}" }}\n'


async def test_with_tls_the_broker_is_known_by_its_certificate(
    operator: Operator, with_tls: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/operations.md says: a tls block, a tls:// address, and SSL_CERT_FILE for an authority of one's own."""
    config = operator.keys.config
    config.write_text(config.read_text() + with_tls)
    operator.server.reload()
    with monkeypatch.context() as elsewhere:
        elsewhere.delenv("SSL_CERT_FILE")
        with pytest.raises(
            BusError, match=r"not among the system's authorities.* --tls-ca, SYNCLINE_TLS_CA or SSL_CERT_FILE"
        ):
            await operator.connect("a1", "tls")
    bus = await operator.connect("a1", "tls")
    core = await operator.connect("coordinator", "tls")
    assert not await answered(bus, "a1", 5.0), "and nobody is there who answers"
    assert core.max_payload == bus.max_payload > 1 << 20
    await bus.close()
    await core.close()


async def test_by_tls_nothing_is_said_to_a_broker_without_it(operator: Operator) -> None:
    with pytest.raises(Unavailable, match="answers without TLS"):
        await operator.connect("a1", "tls")
    command = Command(operator.place, ("doctor", "--connect", f"tls://127.0.0.1:{operator.port}", "--only", "broker"))
    assert command.ended() == 1 and "answers without TLS" in command.out + command.err, command.out + command.err
    assert "authorization" not in operator.server.text.lower(), "no login was tried"


async def test_by_tls_nobody_goes_back_to_a_broker_that_lost_it(
    operator: Operator, with_tls: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = operator.keys.config.read_text()
    operator.keys.config.write_text(plain + with_tls)
    operator.server.reload()
    bus = await operator.connect("a1", "tls")
    back = asyncio.Event()
    bus.when_reconnected(back.set)
    operator.keys.config.write_text(plain)
    operator.server.__exit__()
    with Server(operator.keys.config, operator.place / "plain.log"):
        await asyncio.to_thread(until, lambda: "answers without TLS" in caplog.text, 20.0, lambda: caplog.text)
    assert not back.is_set()
    operator.keys.config.write_text(plain + with_tls)
    with Server(operator.keys.config, operator.place / "mended.log"):
        async with asyncio.timeout(20.0):
            await back.wait()
        await bus.close()
