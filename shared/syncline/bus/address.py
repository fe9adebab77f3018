"""Addresses of a broker as a user writes them: one server, or several of a cluster with commas between them.

An address may hold a user and a password, or a token. `masked` is the one way in which an address gets into an error, a hint,
a table or a log.
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
_LOGIN = re.compile(r"(\w://)[^\s,]*@|(^|[\s,])(?![^\s,]*://)[^\s,]*@")


@dataclass(frozen=True, slots=True)
class Server:
    """Where one server listens."""

    scheme: str  # nats, or tls: never in plain text
    host: str  # a name or an address, without brackets
    port: int

    @property
    def url(self) -> str:
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Address:
    """The servers of a broker, and how to log in there where the address says it."""

    servers: tuple[Server, ...]
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)


def masked(text: str) -> str:
    """Return a text with the user, password or token of every address in it replaced by `***`."""
    return _LOGIN.sub(r"\1\2***@", text)


def address_of(text: str, setting: str = "--connect") -> Address:
    """Read an address.

    Args:
        text: `host`, `host:port`, `nats://…` or `tls://…`; several with commas between them.
        setting: the option or variable that holds it.

    Raises:
        ConfigError: it is no address.
    """
    servers, logins = [], set()
    parts = text.split(",")
    for part in parts:
        try:
            server, login = _server(part.strip())
        except ValueError as error:
            if "@" in text:
                hint = "Write special characters of a password as %2C (comma), %20 (space), %2F (slash)"
                raise ConfigError(setting, f"{_hidden(text)!r} is no address: {_about(error, part)}", hint) from None
            shown = repr(text) if len(parts) == 1 else f"{part.strip()!r} in {text!r}"
            raise ConfigError(setting, f"{shown} is no address: {error}", _HINT) from None
        servers.append(server)
        logins |= {login} if login else set()
    if len(servers) > MAX_SERVERS:
        raise ConfigError(setting, f"names {len(servers)} servers", f"Name at most {MAX_SERVERS} of the cluster")
    if len({server.scheme for server in servers}) > 1:
        problem = f"{masked(text)!r} has servers with tls:// and servers without"
        raise ConfigError(setting, problem, "Write tls:// before each of them, or before none")
    if len(logins) > 1:
        problem = f"{masked(text)!r} has different users or tokens"
        raise ConfigError(setting, problem, "Use one for all servers of a cluster")
    return Address(tuple(servers), *next(iter(logins), ()))


def _server(text: str) -> tuple[Server, tuple[str, str, str] | None]:
    """One server, and (user, password, token). Raises ValueError with what is wrong behind the last `@`."""
    if any(mark.isspace() for mark in text):
        raise ValueError("a space stands in it")
    scheme, found, rest = text.rpartition("://")
    scheme = scheme.lower() if found else "nats"
    if scheme not in SCHEMES:
        raise ValueError("only nats:// and tls:// are known")
    login, _, place = rest.rpartition("@")
    place = place.removesuffix("/")
    if not place:
        raise ValueError("names no host")
    host, port = _split(place)
    host = host if ":" in host else host.encode("idna").decode()  # UnicodeError, as for a long name, is a ValueError
    user, has_password, password = login.partition(":")
    secret = (unquote(user), unquote(password), "") if has_password else ("", "", unquote(user))
    return Server(scheme, host, port), secret if login else None


def _split(place: str) -> tuple[str, int]:
    """Host and port. Raises ValueError."""
    if any(mark in place for mark in "/?#"):
        raise ValueError("a path has no meaning here")
    if place.startswith("["):
        host, closed, rest = place[1:].partition("]")
        if not closed or (rest and not rest.startswith(":")):
            raise ValueError("an IPv6 address ends with ]")
        ipaddress.IPv6Address(host)
        port, has_port = rest[1:], bool(rest)
    elif place.count(":") > 1:
        raise ValueError("an IPv6 address stands in brackets, as [::1]:4222")
    else:
        host, found, port = place.partition(":")
        has_port = bool(found)
        if not host:
            raise ValueError("names no host")
        if host.isdigit():
            raise ValueError(f"{host!r} is a port without a host")
        if _HOST.fullmatch(host) is None:
            raise ValueError(f"{host!r} is no host name")
    if has_port and not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 1 << 16):
        raise ValueError(f"port {port!r} is no number from 1 to 65535")
    return host, int(port) if has_port else PORT


def _about(error: ValueError, part: str) -> str:
    """What is wrong with a part; a part without `@` may be half of a password, and is not quoted."""
    return str(error) if "@" in part else "a comma separates servers, and one of them is empty"


def _hidden(text: str) -> str:
    """Like `masked` for a text that may be no address: a secret with a comma or a space in it is hidden as well."""
    scheme, found, rest = text.partition("://")
    prefix = f"{scheme}://" if found and "@" not in scheme else ""
    rest = rest if prefix else text
    return f"{prefix}***@{rest.rpartition('@')[2]}" if "@" in rest else text
