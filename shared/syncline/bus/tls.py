"""Certificates for a broker with TLS: which ones this side uses, and what is wrong where they do not fit."""

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
    """Files in PEM form; '' for none. They are read anew for each connection, so that certificates may be renewed."""

    ca: str = ""  # of the authorities that may have signed the broker's certificate; '': those of the system
    cert: str = ""  # this client's own, for a broker that asks for one
    key: str = ""  # its private key; '': in the same file as the certificate

    @property
    def given(self) -> bool:
        return self != Tls()

    def context(self) -> ssl.SSLContext:
        """Raises ConfigError for a file that cannot be read or does not hold what it should."""
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
    try:
        return load()
    except ssl.SSLError as error:
        problem = f"{file} cannot be used: {error.reason or error}"
        hint = "Name a file in PEM form; of a certificate and its key, both without a passphrase"
        raise ConfigError(setting, problem, hint) from None
    except OSError as error:
        raise ConfigError(setting, f"{file}: {error.strerror}", "Name a file that you can read") from None


def check_info(info: dict[str, Any], wants_tls: bool, tls: Tls) -> None:
    """Raise Unfit where what a server says first of TLS does not fit what was asked for."""
    if wants_tls and not info.get("tls_required"):
        hint = "Add a `tls` block to its nats-server.conf, or write nats:// where the network is your own"
        raise Unfit("the address or an option asks for TLS, and the broker answers without TLS", hint)
    if info.get("tls_verify") and not tls.cert:
        raise Unfit("the broker asks for a client certificate, and none is named", "Name it: --tls-cert, --tls-key")


def unfit(error: Exception, tls: Tls) -> Unfit | None:
    """Return what a failed handshake means; None for an error about something else."""
    if isinstance(error, ssl.SSLCertVerificationError):
        why = error.verify_message or str(error)
        if "ostname mismatch" in why or "IP address mismatch" in why:
            hint = "Use the name that stands in its certificate, or a certificate with this name"
            return Unfit(f"the broker's certificate is another host's: {why}", hint)
        if "expired" in why or "not yet valid" in why:
            return Unfit(f"the broker's certificate: {why}", "Renew it; or set the clock of this machine")
        known = f"--tls-ca {tls.ca}" if tls.ca else "the system's authorities"
        hint = "Name the certificate of its authority with --tls-ca, SYNCLINE_TLS_CA or SSL_CERT_FILE"
        return Unfit(f"the authority of the broker's certificate is not among {known}: {why}", hint)
    if isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or "").upper():
        hint = "Use one that the broker's authority (`ca_file` in its `tls` block) has signed"
        return Unfit(f"the broker refuses this client's certificate: {error.reason}", hint)
    return None
