"""Signatures by nkeys (ed25519): the author of an update can be verified long after the broker let the update through."""

from __future__ import annotations

import base64
import binascii

import nkeys
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

_KEY = slice(1, 33)  # a public nkey is base32 of one prefix byte, the key, and a checksum of two bytes


class Signer:
    """Signs with the private half of an nkey."""

    def __init__(self, seed: str) -> None:
        self._pair = nkeys.from_seed(bytearray(seed.encode()))
        self.public_key = str(self._pair.public_key.decode())

    def sign(self, data: bytes) -> bytes:
        """Return the signature of the data, 64 bytes."""
        return bytes(self._pair.sign(data))


def verify(public_key: str, data: bytes, signature: bytes) -> bool:
    """Return whether the owner of the public key signed exactly these bytes; False also for a malformed key or
    signature.
    """
    try:
        raw = base64.b32decode(public_key + "=" * (-len(public_key) % 8))
        VerifyKey(raw[_KEY]).verify(data, signature)
    except (binascii.Error, ValueError, TypeError, BadSignatureError):
        return False
    return True
