"""Certificates for a broker with TLS: the files of this client, and the errors when client and broker do not fit."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from syncline.errors import ConfigError, Unfit

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Tls:
    """Paths of PEM files. Each connection reads the files again, so certificates can be renewed while a service runs."""

    ca: str = ""  # the authorities that may have signed the broker's certificate; '': those of the system
    cert: str = ""  # the certificate of this client; '': none, for a broker that asks for none
    key: str = ""  # the private key of `cert`; '': the file of the certificate contains the key

    @property
    def given(self) -> bool:
        """Whether any file is named."""
        return self != Tls()

    def context(self) -> ssl.SSLContext:
        """Return a TLS context with these files.

        Raises:
            ConfigError: a file cannot be read or has the wrong content, or a key is named without a certificate.
        """
        if self.key and not self.cert:
            raise ConfigError("--tls-key", f"{self.key} is a key without a certificate", "Name it with --tls-cert")
        context = _loaded("--tls-ca", self.ca, lambda: ssl.create_default_context(cafile=self.ca or None))
        if self.cert:
            with_key = self.key or None
            for setting, file in (("--tls-cert", self.cert), ("--tls-key", self.key)):
                if file:
                    _loaded(setting, file, Path(file).read_bytes)
            _loaded("--tls-cert", self.cert, lambda: context.load_cert_chain(self.cert, with_key, password=""))
        return context


def _loaded(setting: str, file: str, load: Callable[[], T]) -> T:
    """Return the result of `load`; turn its error into a ConfigError about the setting and its file."""
    try:
        return load()
    except ssl.SSLError as error:
        problem = f"{file} cannot be used: {error.reason or error}"
        hint = "Name a file in PEM form. A private key must have no passphrase"
        raise ConfigError(setting, problem, hint) from None
    except OSError as error:
        raise ConfigError(setting, f"{file}: {error.strerror}", "Name a file that you can read") from None


def check_info(info: dict[str, Any], wants_tls: bool, tls: Tls) -> None:
    """Verify that a server offers the TLS that this client wants, and asks only for certificates that the client has.

    Args:
        info: the INFO message of the server.
        wants_tls: whether the address or an option asks for TLS.
        tls: the files of this client.

    Raises:
        Unfit: the server would continue without TLS, or asks for a client certificate and none is named.
    """
    if wants_tls and not info.get("tls_required"):
        hint = "Add a `tls` block to its nats-server.conf, or use nats:// if you trust the network"
        raise Unfit("the address or an option asks for TLS, and the broker answers without TLS", hint)
    if info.get("tls_verify") and not tls.cert:
        hint = "Name it with --tls-cert and --tls-key"
        raise Unfit("the broker asks for a client certificate, and none is named", hint)


def unfit(error: Exception, tls: Tls) -> Unfit | None:
    """Explain a failed TLS handshake.

    Args:
        error: the error of the connection attempt.
        tls: the files that the attempt used.

    Returns:
        The error with a hint for the user, or None if `error` is not about certificates.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        why = error.verify_message or str(error)
        if "ostname mismatch" in why or "IP address mismatch" in why:
            hint = "Use the host name in its certificate, or give the broker a certificate with this name"
            return Unfit(f"the broker's certificate belongs to another host: {why}", hint)
        if "expired" in why or "not yet valid" in why:
            return Unfit(f"the broker's certificate: {why}", "Renew it, or correct the clock of this machine")
        known = f"--tls-ca {tls.ca}" if tls.ca else "the system's authorities"
        hint = "Name the certificate of its authority with --tls-ca, SYNCLINE_TLS_CA or SSL_CERT_FILE"
        return Unfit(f"the authority of the broker's certificate is not among {known}: {why}", hint)
    if isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or "").upper():
        hint = "Use a certificate signed by the broker's authority (`ca_file` in its `tls` block)"
        return Unfit(f"the broker refuses this client's certificate: {error.reason}", hint)
    return None
