"""Payloads as tensors, and tensors as payloads: the parts of a codec's work that need torch."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from syncline.transform.codecs import Codec
from syncline.transform.torch_dtypes import TORCH_DTYPES


def decoded(codec: Codec, payload: bytes, elements: int, dtype: str) -> Tensor:
    """Return the elements of a payload, to be read only: its very bytes where the codec is an identity.

    Raises:
        ValueError: the payload is not one of this codec for so many elements.
    """
    if codec.identity and sys.byteorder == "little":
        return torch.frombuffer(payload, dtype=TORCH_DTYPES[dtype], count=elements)
    out_E = torch.empty(elements, dtype=TORCH_DTYPES[dtype])
    codec.decode(payload, out_E)
    return out_E


def payload_of(codec: Codec, x_E: Tensor) -> memoryview:
    """Return the payload of one chunk of a codec that keeps no state. Use it before the tensor changes."""
    assert not codec.vectors, f"{codec.kind} keeps vectors: encode whole updates"
    return codec.encode(x_E, [slice(0, x_E.numel())], ())[0][0]


def write_payloads(payloads: Iterable[memoryview], out: memoryview) -> int:
    """Write payloads one behind the other; return how many bytes that were."""
    begin = 0
    for payload in payloads:
        end = begin + len(payload)
        out[begin:end] = payload
        begin = end
    return begin


with (
    warnings.catch_warnings()
):  # torch warns, once in a process, about writes to read-only bytes; these tensors are only read
    warnings.simplefilter("ignore")
    torch.frombuffer(bytes(4), dtype=torch.float32)
