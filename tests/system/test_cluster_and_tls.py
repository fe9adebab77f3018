"""Real nats-servers: client certificates, and a cluster whose connections all move when one server is killed."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from syncline.bus.nats.bus import NatsBus
from syncline.bus.nats.lane import Connection
from syncline.bus.tls import Tls
from syncline.errors import Unfit
from syncline_cli import main as cli
from system.command import until
from system.server import Server, free_port

pytestmark = pytest.mark.timeout(120)


# -- client certificates -------------------------------------------------------------------------------------------------
@dataclass
class Verifying:
    """A broker that asks for client certificates."""

    url: str
    authority: trustme.CA
    place: Path
    ca: str

    def certificate(self, name: str, authority: trustme.CA) -> tuple[str, str]:
        """The files of a certificate and its key."""
        issued = authority.issue_cert(name)
        files = (self.place / f"{name}.crt", self.place / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(str(files[0]))
        issued.private_key_pem.write_to_path(str(files[1]))
        return str(files[0]), str(files[1])


@pytest.fixture(scope="module")
def verifying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Verifying]:
    place, port, authority = tmp_path_factory.mktemp("tls"), free_port(), trustme.CA()
    made = Verifying(f"tls://127.0.0.1:{port}", authority, place, str(place / "ca.crt"))
    authority.cert_pem.write_to_path(made.ca)
    certificate, key = made.certificate("127.0.0.1", authority)
    config = place / "tls.conf"
    config.write_text(
        f'listen: "127.0.0.1:{port}"\njetstream {{ store_dir: "{place}/store" }}\n'
        f'tls {{ cert_file: "{certificate}", key_file: "{key}", ca_file: "{made.ca}", verify: true }}\n'
    )
    with Server(config, place / "tls.log"):
        yield made


async def test_a_client_certificate_opens_the_door(verifying: Verifying) -> None:
    own, key = verifying.certificate("a1", verifying.authority)
    bus = await NatsBus.connect(Connection(verifying.url, "a1", tls=Tls(verifying.ca, own, key)))
    assert bus.max_payload > 0
    await bus.close()


async def test_a_client_without_a_certificate_is_told_what_to_name(verifying: Verifying) -> None:
    with pytest.raises(Unfit, match=r"asks for a client certificate, and none is named\. Name it with --tls-cert"):
        await NatsBus.connect(Connection(verifying.url, "a1", tls=Tls(verifying.ca)))


async def test_a_certificate_of_another_authority_is_refused(verifying: Verifying) -> None:
    own, key = verifying.certificate("stranger", trustme.CA())
    with pytest.raises(Unfit, match="the broker refuses this client's certificate"):
        await NatsBus.connect(Connection(verifying.url, "a1", tls=Tls(verifying.ca, own, key)))


def test_commands_take_certificates_as_options_and_as_variables(
    verifying: Verifying, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, key = verifying.certificate("cli", verifying.authority)
    options = ["--connect", verifying.url, "--tls-ca", verifying.ca, "--tls-cert", own, "--tls-key", key]
    assert cli.main(["doctor", *options, "--only", "broker", "--only", "key", "--only", "jetstream"]) == 0
    assert cli.main(["ls", *options]) == 0
    assert "no runs on" in capsys.readouterr().out
    for name, value in (("URL", verifying.url), ("CA", verifying.ca), ("CERT", own), ("KEY", key)):
        monkeypatch.setenv("SYNCLINE_NATS_URL" if name == "URL" else f"SYNCLINE_TLS_{name}", value)
    assert cli.main(["ls"]) == 0


def test_the_doctor_says_what_to_do_about_certificates(
    verifying: Verifying, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor = ["doctor", "--connect", verifying.url, "--only", "broker", "--only", "key"]
    own, key = verifying.certificate("doctor", verifying.authority)
    assert cli.main([*doctor, "--tls-cert", own, "--tls-key", key]) == 1
    said = capsys.readouterr().out
    assert "is not among the system's authorities" in said and "SSL_CERT_FILE" in said and "--tls-ca" in said
    assert cli.main([*doctor, "--tls-ca", verifying.ca]) == 1
    assert "asks for a client certificate" in capsys.readouterr().out
    stranger, strangers_key = verifying.certificate("stranger", trustme.CA())
    assert cli.main([*doctor, "--tls-ca", verifying.ca, "--tls-cert", stranger, "--tls-key", strangers_key]) == 1
    assert "refuses this client's certificate" in capsys.readouterr().out
    assert cli.main([*doctor, "--tls-ca", verifying.ca, "--tls-cert", own, "--tls-key", strangers_key]) == 1
    said = capsys.readouterr().out
    assert "--tls-cert" in said and "KEY_VALUES_MISMATCH" in said


# -- users and passwords ---------------------------------------------------------------------------------------------------
def test_a_password_in_an_address_is_used_and_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port, config = free_port(), tmp_path / "users.conf"
    config.write_text(
        f'listen: "127.0.0.1:{port}"\njetstream {{ store_dir: "{tmp_path}/store" }}\n'
        'authorization { user: alice, password: "s3,cr3t@home" }\n'
    )
    with Server(config, tmp_path / "users.log"):
        assert cli.main(["ls", "--connect", f"nats://alice:s3%2Ccr3t%40home@127.0.0.1:{port}"]) == 0
        said = "".join(capsys.readouterr())
        assert f"no runs on nats://***@127.0.0.1:{port}" in said and "alice" not in said and "cr3t" not in said
        assert cli.main(["ls", "--connect", f"nats://alice:wr0ng@127.0.0.1:{port}"]) == 2
        said = "".join(capsys.readouterr())
        assert "Correct the user and password" in said and "wr0ng" not in said and "alice" not in said


# -- a cluster -----------------------------------------------------------------------------------------------------------
BUSES = 6  # of two connections each


class Cluster:
    """Three servers that know each other."""

    def __init__(self, place: Path) -> None:
        self.ports, self.monitors = ([free_port() for _ in range(3)] for _ in range(2))
        routes = [free_port() for _ in range(3)]
        known = ", ".join(f'"nats://127.0.0.1:{route}"' for route in routes)
        self.servers = []
        for i, (port, monitor, route) in enumerate(zip(self.ports, self.monitors, routes, strict=True)):
            config = place / f"{i}.conf"
            config.write_text(
                f'server_name: s{i}\nlisten: "127.0.0.1:{port}"\nhttp: "127.0.0.1:{monitor}"\n'
                f'cluster {{ name: c, listen: "127.0.0.1:{route}", routes: [{known}] }}\n'
            )
            self.servers.append(Server(config, place / f"{i}.log"))

    def url(self, i: int) -> str:
        return f"nats://127.0.0.1:{self.ports[i]}"

    def count(self, i: int, page: str, figure: str) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.monitors[i]}/{page}", timeout=5.0) as answer:
            return int(json.load(answer)[figure])

    def knows_itself(self) -> bool:
        return all(self.count(i, "routez", "num_routes") >= 2 for i in range(3))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    with ExitStack() as stack:
        for server in made.servers:
            stack.enter_context(server)
        until(made.knows_itself, 20.0, lambda: made.servers[0].text)
        yield made


async def test_all_connections_move_when_a_server_of_a_cluster_is_killed(cluster: Cluster) -> None:
    buses = [await NatsBus.connect(Connection(cluster.url(0), f"a{i}")) for i in range(BUSES)]
    try:
        assert cluster.count(0, "connz", "num_connections") == 2 * BUSES
        cluster.servers[0].process.kill()

        def moved() -> int:
            return cluster.count(1, "connz", "num_connections") + cluster.count(2, "connz", "num_connections")

        deadline = time.monotonic() + 15.0
        while moved() < 2 * BUSES:
            assert time.monotonic() < deadline, f"{moved()} of {2 * BUSES} connections moved"
            await asyncio.sleep(0.1)
        listed = await NatsBus.connect(Connection(f"{cluster.url(0)},{cluster.url(1)}", "late"))
        await listed.close()
    finally:
        await asyncio.gather(*(bus.close() for bus in buses))


def test_a_command_gets_in_where_one_server_of_the_list_is_down(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = f"nats://127.0.0.1:{free_port()}"
    assert cli.main(["doctor", "--connect", f"{nowhere},{cluster.url(2)}", "--only", "broker"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("warning") and f"no server answers at {nowhere}" in said and "is nats-server" in said
