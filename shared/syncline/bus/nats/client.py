"""A subclass of nats-py's client that insists on `tls://`, refuses servers that are too old, and closes failed sockets.

nats-py itself continues in plain text if a server does not ask for TLS, even with a `tls://` address, so a machine on the way
could take over the connection. This client sends nothing to such a server, at the first connection and at every later one.

nats-py also leaves the socket of a failed attempt open until garbage collection, if the attempt failed after the TCP connection
(no TLS, a refused login, a silent server). This client closes the socket before the next attempt.
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
    """The server must not be used. nats-py handles this error as a failed attempt to connect."""

    def __init__(self, reason: Unfit) -> None:
        self.reason = reason
        super().__init__(str(reason))


class Client(nats.aio.client.Client):  # type: ignore[misc]  # nats-py is not typed
    """A client of nats-py that raises Refused before sending data to an unfit server, and has at most one open socket."""

    def __init__(self, tls: Tls | None = None) -> None:
        super().__init__()
        self._certificates = Tls() if tls is None else tls

    @property
    def ssl_context(self) -> ssl.SSLContext:
        """The TLS context of the next attempt, with the certificate files as they are now."""
        try:
            return self._certificates.context()
        except ConfigError as error:  # another process may be replacing the file; the next attempt reads it again
            raise nats.errors.Error(str(error)) from None

    async def _connect_to_server(self, s: Any) -> None:
        if self._transport is not None:
            self._transport.close()
        await super()._connect_to_server(s)

    async def _process_connect_init(self) -> None:
        try:
            await super()._process_connect_init()
        except ssl.SSLError as error:
            reason = unfit(error, self._certificates)
            if reason is None:
                raise
            raise Refused(reason) from None

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        server = self._current_server
        if initial_connection and server is not None:
            try:
                check_version(info)
                check_info(info, server.uri.scheme == "tls" or self._certificates.given, self._certificates)
            except Unfit as reason:
                raise Refused(reason) from None
        await super()._process_info(info, initial_connection)


def next_server(servers: list[Any], _info: dict[str, Any]) -> tuple[Any, float]:
    """Choose the server of the next attempt: the one with the fewest failed attempts since its last connection.

    Without this choice nats-py tries the first server of its pool for ever.

    Returns:
        The server, and a random delay in seconds, so that many clients do not reconnect together.
    """
    return min(servers, key=lambda server: server.reconnects), random.uniform(0.05, 0.5)
