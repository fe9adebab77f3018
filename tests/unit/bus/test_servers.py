"""Which servers are talked to: none that is too old or lacks the TLS that is asked for; and where a lost connection goes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from syncline.bus.connect import connect
from syncline.bus.nats.client import next_server
from syncline.bus.server_version import LEAST_VERSION, check_version
from syncline.bus.tls import Tls, check_info
from syncline.errors import ConfigError, Unfit, Unreachable
from syncline_cli.doctor.checks_broker import Broker, Target


class Pooled(NamedTuple):
    """A server of nats-py's pool."""

    name: str
    reconnects: int


@asynccontextmanager
async def said_by(info: dict[str, Any]) -> AsyncIterator[tuple[str, bytearray]]:
    """A server that says this and listens; its address, and what it was told."""
    heard = bytearray()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"INFO " + json.dumps(info).encode() + b"\r\n")
        heard.extend(await reader.read())
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        yield f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}", heard


@pytest.mark.parametrize("version", ["2.9.10", "2.10.29", "v2.2.0", "1.4.1", "2.10.99-beta.1"])
async def test_a_server_that_is_too_old_is_refused_and_told_nothing(version: str) -> None:
    async with said_by({"version": version, "max_payload": 1 << 20, "jetstream": True}) as (url, heard):
        with pytest.raises(Unfit, match=f"the broker is nats-server {version}, .* Upgrade it"):
            await connect(url, "a1", patience_s=1.0)
        found = await Broker(Target(url)).reachable()
        assert found.verdict == "broken" and version in found.text and "Upgrade it" in found.hint
    assert not heard


@pytest.mark.parametrize("version", [".".join(map(str, LEAST_VERSION)), "2.15.1", "3.0.0", "2.99.0-dev", "", "unknown"])
def test_a_server_that_is_new_enough_or_says_no_version_is_taken(version: str) -> None:
    check_version({"version": version})


@pytest.mark.parametrize(
    ("info", "wants_tls", "tls", "said"),
    [
        ({}, True, Tls(), "answers without TLS"),
        ({"tls_available": True}, True, Tls(), "answers without TLS"),
        ({"tls_required": True, "tls_verify": True}, True, Tls(ca="ca.pem"), "asks for a client certificate"),
    ],
)
def test_a_server_whose_tls_does_not_fit_is_refused(info: dict[str, Any], wants_tls: bool, tls: Tls, said: str) -> None:
    with pytest.raises(Unfit, match=said):
        check_info(info, wants_tls, tls)


def test_a_server_whose_tls_fits_is_taken() -> None:
    check_info({}, False, Tls())
    check_info({"tls_required": True}, False, Tls())
    check_info({"tls_required": True, "tls_verify": True}, True, Tls(cert="own.pem"))


async def test_naming_certificates_asks_for_tls(tmp_path: Path) -> None:
    import trustme

    trustme.CA().cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    async with said_by({"version": "2.15.0", "max_payload": 1 << 20}) as (url, heard):
        with pytest.raises(Unfit, match="answers without TLS"):
            await connect(url, "a1", patience_s=1.0, tls=Tls(ca=str(tmp_path / "ca.pem")))
    assert not heard


@pytest.mark.parametrize(
    ("tls", "setting"),
    [
        (Tls(ca="missing.pem"), "--tls-ca"),
        (Tls(ca=__file__), "--tls-ca"),
        (Tls(cert="missing.pem"), "--tls-cert"),
        (Tls(cert=__file__), "--tls-cert"),
        (Tls(cert=__file__, key="missing.pem"), "--tls-key"),
        (Tls(key=__file__), "--tls-key"),
    ],
)
async def test_certificates_that_cannot_be_read_are_named(tls: Tls, setting: str) -> None:
    with pytest.raises(ConfigError) as error:
        await connect("nats://127.0.0.1:1", "a1", patience_s=0.0, tls=tls)
    assert error.value.setting == setting and error.value.hint


def test_a_lost_connection_goes_to_the_server_with_the_fewest_attempts() -> None:
    first, second, third = Pooled("first", 2), Pooled("second", 0), Pooled("third", 1)
    chosen, delay_s = next_server([first, second, third], {})
    assert chosen is second and 0 < delay_s < 1
    assert next_server([first], {})[0] is first


async def test_a_list_of_servers_is_tried_until_one_answers() -> None:
    with pytest.raises(Unreachable, match=r"no broker answers at 127\.0\.0\.1:1,127\.0\.0\.1:2: "):
        await connect("127.0.0.1:1,127.0.0.1:2", "a1", patience_s=0.1)
