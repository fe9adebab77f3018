"""nats-py's client, made to insist on `tls://`, to refuse servers that are too old, and to close its sockets.

nats-py goes on in plain text if a server does not ask for TLS, even for a `tls://` address: a machine on the way could
take the connection over. This client sends nothing to such a server, at the first connection and at every later one.

nats-py also forgets the socket of an attempt that failed after the TCP connection stood (no TLS, a refused login, a
silent server); the socket stayed open until the next garbage collection.
"""

from __future__ import annotations

import random
import ssl
from typing import Any

import nats.aio.client
import nats.errors

from syncline.bus.server_version import check_version
from syncline.bus.tls import Tls, check_info, unfit
from syncline.errors import ConfigError, Unfit


class Refused(nats.errors.Error):  # type: ignore[misc]  # nats-py is not typed
    """The server is unfit. nats-py reports this error as any failed attempt."""

    def __init__(self, why: Unfit) -> None:
        self.why = why
        super().__init__(str(why))


class Client(nats.aio.client.Client):  # type: ignore[misc]  # nats-py is not typed
    """Raises Refused before anything is sent to an unfit server, and holds one socket at most."""

    def __init__(self, tls: Tls | None = None) -> None:
        super().__init__()
        self._certificates = Tls() if tls is None else tls

    @property
    def ssl_context(self) -> ssl.SSLContext:
        """Return a context from the certificate files as they are now."""
        try:
            return self._certificates.context()
        except ConfigError as error:  # a file that is just being replaced: the next attempt reads it again
            raise nats.errors.Error(str(error)) from None

    async def _connect_to_server(self, s: Any) -> None:
        if self._transport is not None:
            self._transport.close()
        await super()._connect_to_server(s)

    async def _process_connect_init(self) -> None:
        try:
            await super()._process_connect_init()
        except ssl.SSLError as error:
            why = unfit(error, self._certificates)
            if why is None:
                raise
            raise Refused(why) from None

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        server = self._current_server
        if initial_connection and server is not None:
            try:
                check_version(info)
                check_info(info, server.uri.scheme == "tls" or self._certificates.given, self._certificates)
            except Unfit as why:
                raise Refused(why) from None
        await super()._process_info(info, initial_connection)


def next_server(servers: list[Any], _info: dict[str, Any]) -> tuple[Any, float]:
    """Choose the server for a reconnect: the one with the fewest failed attempts since its last success, after a
    jitter.

    Without this choice nats-py tries the first server of its pool for ever.
    """
    return min(servers, key=lambda server: server.reconnects), random.uniform(0.05, 0.5)
