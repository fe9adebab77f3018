"""nats-py's client, which keeps to `tls://` and closes what it opened.

As it comes it goes on in plain text where a server does not ask for TLS, whatever the address says: whoever sits on the way
could take the connection over. Here such a server is told nothing, at the first connection and at each later one.

It also forgets the socket of an attempt that failed after the TCP connection stood (no TLS, a login refused, a server that
says nothing): each one stayed open until the garbage collector came by.
"""

from __future__ import annotations

import logging
from typing import Any

import nats.aio.client
import nats.errors

log = logging.getLogger(__name__)

WITHOUT_TLS = "the address says tls://, and the broker answers without TLS"
TLS_MEND = "Add a `tls` block to its nats-server.conf, or write nats:// where the network is your own"


class WithoutTls(nats.errors.Error):  # type: ignore[misc]  # nats-py is not typed
    """The server does not do what the address says."""

    def __str__(self) -> str:
        return f"{WITHOUT_TLS}. {TLS_MEND}"


class Client(nats.aio.client.Client):  # type: ignore[misc]  # nats-py is not typed
    """Raises WithoutTls before anything is sent to such a server; holds one socket at most."""

    async def _connect_to_server(self, s: Any) -> None:
        if self._transport is not None:
            self._transport.close()
        await super()._connect_to_server(s)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        server = self._current_server
        if initial_connection and server is not None and server.uri.scheme == "tls" and not info.get("tls_required"):
            error = WithoutTls()
            log.warning("%s", error)
            raise error
        await super()._process_info(info, initial_connection)
