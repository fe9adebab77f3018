"""Addresses of a broker as a user writes them: one server, or several servers of a cluster with commas between them.

An address may contain a user and a password, or a token. Every error, hint, table and log line shows an address through
`masked`.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from urllib.parse import unquote

from syncline.errors import ConfigError

PORT = 4222
SCHEMES = ("nats", "tls")
MAX_SERVERS = 100
_HINT = "Write it as nats://host:4222, with commas between the servers of a cluster"
_HOST = re.compile(r"\w(?:[\w.-]*\w)?\.?")
# The part of an address before its last `@`, with or without a scheme before it.
_LOGIN = re.compile(r"(\w://)[^\s,]*@|(^|[\s,])(?![^\s,]*://)[^\s,]*@")


@dataclass(frozen=True, slots=True)
class Server:
    """The network address of one server."""

    scheme: str  # "nats", or "tls" for connections that are always encrypted
    host: str  # a name or an IP address, without brackets
    port: int

    @property
    def url(self) -> str:
        """`scheme://host:port`, with brackets around an IPv6 address."""
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Address:
    """The servers of a broker, and the user and password, or the token, if the address contains them."""

    servers: tuple[Server, ...]
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)


def masked(text: str) -> str:
    """Return a text with the user, password or token of every address in the text replaced by `***`."""
    return _LOGIN.sub(r"\1\2***@", text)


def address_of(text: str, setting: str = "--connect") -> Address:
    """Parse an address.

    Args:
        text: `host`, `host:port`, `nats://…` or `tls://…`; several servers with commas between them.
        setting: the option or variable that holds the address, for the error.

    Raises:
        ConfigError: the text is not a valid address, mixes tls:// with nats://, or has several logins.
    """
    servers: list[Server] = []
    logins: set[tuple[str, str, str]] = set()
    parts = text.split(",")
    for part in parts:
        try:
            server, login = _server(part.strip())
        except ValueError as error:
            if "@" in text:
                hint = "Write special characters of a password as %2C (comma), %20 (space), %2F (slash)"
                problem = f"{_hidden(text)!r} is not an address: {_about(error, part)}"
                raise ConfigError(setting, problem, hint) from None
            shown = repr(text) if len(parts) == 1 else f"{part.strip()!r} in {text!r}"
            raise ConfigError(setting, f"{shown} is not an address: {error}", _HINT) from None
        servers.append(server)
        if login is not None:
            logins.add(login)
    if len(servers) > MAX_SERVERS:
        raise ConfigError(setting, f"names {len(servers)} servers", f"Name at most {MAX_SERVERS} of the cluster")
    if len({server.scheme for server in servers}) > 1:
        problem = f"{masked(text)!r} has servers with tls:// and servers without"
        raise ConfigError(setting, problem, "Write tls:// before every server, or before no server")
    if len(logins) > 1:
        problem = f"{masked(text)!r} has different users or tokens"
        raise ConfigError(setting, problem, "Use the same one for all servers of a cluster")
    return Address(tuple(servers), *next(iter(logins), ()))


def _server(text: str) -> tuple[Server, tuple[str, str, str] | None]:
    """Parse one server.

    Returns:
        The server, and (user, password, token) if the text has a login.

    Raises:
        ValueError: the text is not an address. The message quotes only the part after the last `@`, which is no secret.
    """
    if any(mark.isspace() for mark in text):
        raise ValueError("it contains a space")
    scheme, found, rest = text.rpartition("://")
    scheme = scheme.lower() if found else "nats"
    if scheme not in SCHEMES:
        raise ValueError("the scheme must be nats:// or tls://")
    login, _, place = rest.rpartition("@")
    place = place.removesuffix("/")
    if not place:
        raise ValueError("the host is missing")
    host, port = _split(place)
    if ":" not in host:
        host = host.encode("idna").decode()  # UnicodeError, as for a long name, is a ValueError
    user, has_password, password = login.partition(":")
    secret = (unquote(user), unquote(password), "") if has_password else ("", "", unquote(user))
    return Server(scheme, host, port), secret if login else None


def _split(place: str) -> tuple[str, int]:
    """Split `host` or `host:port`; the port is 4222 by default. Raises ValueError for a host or port that is not valid."""
    if any(mark in place for mark in "/?#"):
        raise ValueError("an address has no path")
    if place.startswith("["):
        host, closed, rest = place[1:].partition("]")
        if not closed or (rest and not rest.startswith(":")):
            raise ValueError("the ] of the IPv6 address is missing")
        ipaddress.IPv6Address(host)
        port, has_port = rest[1:], bool(rest)
    elif place.count(":") > 1:
        raise ValueError("write an IPv6 address in brackets, as [::1]:4222")
    else:
        host, found, port = place.partition(":")
        has_port = bool(found)
        if not host:
            raise ValueError("the host is missing")
        if host.isdigit():
            raise ValueError(f"{host!r} is a port without a host")
        if _HOST.fullmatch(host) is None:
            raise ValueError(f"{host!r} is not a host name")
    if has_port and not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 1 << 16):
        raise ValueError(f"port {port!r} is not a number from 1 to 65535")
    return host, int(port) if has_port else PORT


def _about(error: ValueError, part: str) -> str:
    """Return the text of an error about a part. A part without `@` may be half of a password, so the text does not quote it."""
    return str(error) if "@" in part else "a comma separates servers, and one of them is empty"


def _hidden(text: str) -> str:
    """Mask a text that is not a valid address. Unlike `masked`, this also hides a secret with a comma or a space."""
    scheme, found, rest = text.partition("://")
    prefix = f"{scheme}://" if found and "@" not in scheme else ""
    rest = rest if prefix else text
    return f"{prefix}***@{rest.rpartition('@')[2]}" if "@" in rest else text
