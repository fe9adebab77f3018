"""Codecs: the conversion of a trained update to payloads for the wire, and of a payload back to a slice.

A codec is the last link of the chain between a trained update and the wire. A codec works on the flat vector, chunk by
chunk: the payload of a chunk is decoded without the other chunks, so that a coordinator holds a few chunks of every
update and never a whole one. Codec and element type are separate: every codec takes every type of
`syncline.wire.dtypes`.

The number of bytes of a payload depends on the codec, the number of elements and their type alone. A reader therefore
knows the size of every payload before the request, and refuses another size.

To add a codec, write a class with its settings and arithmetic, and a line in `CODECS`; the contract tests pick it up.
The module imports neither torch nor numpy, so that a spec can be read without them: a codec uses the methods of the
tensors and arrays that are passed in.
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
    """A condition of a codec. A run whose settings do not meet the condition is refused when it is submitted."""

    PLAIN_UPDATES = "the coordinator reads every single update"
    AGENT_MEMORY = "every agent takes part so often that what it kept of its last update still fits"
    COMMON_SCALE = "all agents of a merge share one scale"


class Codec(Settings):
    """Base of all codecs: the settings in a spec's `wire.codec`, and the arithmetic. E: elements of a chunk.

    Attributes:
        kind: the name of the codec, in specs, offers, blob references and frames.
        needs: conditions that the run has to meet.
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
            ValueError: the payload has not `payload_bytes` bytes, or its content is impossible. A peer may send any
                bytes: a decoder must refuse bad content and do no other harm.
        """
        raise NotImplementedError


class Raw(Codec):
    """Sends the elements as they are, little-endian. Exact for every bit pattern."""

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
