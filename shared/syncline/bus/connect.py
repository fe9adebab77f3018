"""Connections to a bus by its address. No module outside `syncline.bus` imports an implementation of the bus.

`syncline.bus.memory` is not reachable by an address. Its broker is an object in one process, with hooks for a simulation; an
address would need a table of brokers for the whole process, and that would be hidden state. A simulation makes its own broker
(`syncline_sim.cluster`), and passes the clients that it makes to the services.
"""

from __future__ import annotations

from syncline.bus.address import masked
from syncline.bus.base import Bus
from syncline.bus.nats.bus import NatsBus
from syncline.bus.nats.lane import Connection
from syncline.bus.tls import Tls
from syncline.errors import BusError, ConfigError, Denied, StreamFull, Unavailable, Unfit

PATIENCE_S = 5.0


async def connect(
    url: str, identity: str, seed: str = "", *, tls: Tls | None = None, patience_s: float = PATIENCE_S
) -> Bus:
    """Connect to the bus at an address.

    Args:
        url: one server of a broker, or several of a cluster with commas between them.
        identity: the name of this process on the bus. The broker's permissions allow the inbox of this name.
        seed: the nkey seed to log in with; empty: no key.
        tls: files with certificates, for a broker with TLS.
        patience_s: seconds to go on trying until a broker answers.

    Raises:
        ConfigError: the address or a certificate file is not valid.
        Denied: the broker does not know the key, or asks for a key and none was given.
        Unfit: the broker is too old, or its TLS is not what was asked for.
        Unreachable: no broker answered within `patience_s`.
    """
    return await NatsBus.connect(Connection(url, identity, seed, patience_s, Tls() if tls is None else tls))


def connection_problem(error: BusError, url: str) -> ConfigError:
    """Turn an error of the bus into one about the setting that the user has to correct, `--connect` or `--key`."""
    has_login, url = masked(url) != url, masked(url)
    if isinstance(error, Unfit):
        return ConfigError("--connect", f"{url}: {error.problem}", error.hint)
    if isinstance(error, Denied) and has_login:
        return ConfigError("--connect", str(error), "Correct the user and password, or the token, in the address")
    if isinstance(error, Denied):
        return ConfigError("--key", str(error), "Name the key file made for this broker with --key or SYNCLINE_KEY")
    if isinstance(error, StreamFull):
        return ConfigError("--connect", f"{url}: {error}", error.hint)
    if isinstance(error, Unavailable):
        return ConfigError("--connect", f"{url}: {error}", "")
    return ConfigError("--connect", str(error), "Start the broker, or name another with --connect or SYNCLINE_NATS_URL")
