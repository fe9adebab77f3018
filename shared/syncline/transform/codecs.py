"""Codecs: how a trained update becomes payloads for the wire, and a payload becomes a slice of it again.

A codec is one link of the chain between a trained update and the wire, the last one. It works on the flat vector, chunk by
chunk: the payload of a chunk is decoded without the other chunks, so that a coordinator holds a few chunks of every update and
never a whole one. Codec and element type are separate: every codec takes every type of `syncline.wire.dtypes`.

The number of bytes of a payload depends on the codec, the number of elements and their type alone. A reader therefore knows the
size of every payload before it asks for it, and refuses another one.

To add one: a class with its settings and arithmetic, and a line in `CODECS`; the contract tests pick it up. The module reads
neither torch nor numpy by itself, so that a spec can be read without them: everything a codec does are methods of the tensors
and arrays that it is given.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Literal

from syncline.settings import Settings
from syncline.wire.dtypes import Dtype

if TYPE_CHECKING:
    from torch import Tensor


class Need(Enum):
    """Something that a codec cannot do without. A run whose settings do not provide it is refused when it is submitted."""

    PLAIN_UPDATES = "the coordinator reads every single update"
    AGENT_MEMORY = "every agent takes part so often that what it kept of its last update still fits"
    COMMON_SCALE = "all agents of a merge share one scale"


class Codec(Settings):
    """Base of all codecs: the settings in a spec's `wire.codec`, and the arithmetic. E: elements of a chunk.

    Attributes:
        kind: the name of the codec, in specs, offers, blob references and frames.
        needs: what a run has to provide.
        vectors: flat vectors that an agent keeps from one update to the next, such as a residual; zeros at first.
        identity: a payload holds the elements as they are, little-endian, so that a reader may use its bytes in place.
    """

    kind: str
    needs: ClassVar[frozenset[Need]] = frozenset()
    vectors: ClassVar[int] = 0
    identity: ClassVar[bool] = False

    def payload_bytes(self, elements: int, dtype: Dtype) -> int:
        """Return the bytes of the payload of so many elements; at most those of the elements themselves."""
        raise NotImplementedError

    def encode(
        self, update_P: Tensor, chunks: Sequence[slice], state: Sequence[Tensor]
    ) -> tuple[Sequence[memoryview], Sequence[Tensor]]:
        """Encode an update.

        Args:
            update_P: the flat vector, on the CPU; not changed.
            chunks: the elements of each chunk, in order.
            state: the `vectors` that this agent keeps, as the encoding before left them; not changed.

        Returns:
            The payload of each chunk, which may share memory with `update_P`: use it before that changes. And the new state.
        """
        raise NotImplementedError

    def decode(self, payload: bytes | memoryview, out_E: Tensor) -> None:
        """Write the elements of one payload into `out_E`, a contiguous slice on the CPU.

        Raises:
            ValueError: the payload has not `payload_bytes` bytes, or the codec never writes such bytes. A peer sends what it
                likes, so that no content may do anything worse.
        """
        raise NotImplementedError


class Raw(Codec):
    """Send the elements as they are, little-endian. Exact for every bit pattern."""

    kind: Literal["raw"] = "raw"
    identity: ClassVar[bool] = True

    def payload_bytes(self, elements: int, dtype: Dtype) -> int:
        return elements * dtype.itemsize

    def encode(
        self, update_P: Tensor, chunks: Sequence[slice], state: Sequence[Tensor]
    ) -> tuple[Sequence[memoryview], Sequence[Tensor]]:
        array = update_P.numpy()
        if sys.byteorder == "big":
            array = array.byteswap()
        return [array[chunk].view("u1").data for chunk in chunks], state

    def decode(self, payload: bytes | memoryview, out_E: Tensor) -> None:
        array = out_E.numpy()
        array.view("u1").data[:] = payload
        if sys.byteorder == "big":
            array.byteswap(inplace=True)


CODECS: dict[str, type[Codec]] = {"raw": Raw}
RAW = Raw()
