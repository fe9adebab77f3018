"""One contract for every codec: so many bytes, chunk by chunk, read again with the error it states, and no other bytes."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from syncline.model.manifest import Manifest
from syncline.transform.codecs import CODECS, RAW, Codec, Need
from syncline.transform.payloads import decoded, payload_of, write_payloads
from syncline.transform.torch_dtypes import TORCH_DTYPES
from syncline.wire import messages
from syncline.wire.dtypes import DTYPES, Dtype

EXACT = {"raw"}  # to the last bit
RELATIVE_ERROR: dict[str, float] = {"raw": 0.0}  # ‖x − q‖ / ‖x‖ of normal random numbers, at most
CHUNK = 1024


@pytest.fixture(params=sorted(CODECS))
def codec(request: pytest.FixtureRequest) -> Codec:
    return CODECS[request.param]()  # type: ignore[call-arg]


@pytest.fixture(params=sorted(DTYPES))
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def sample(elements: int, dtype: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(elements, generator=generator, dtype=TORCH_DTYPES[dtype])


def chunks_of(elements: int, size: int = CHUNK) -> list[slice]:
    return [slice(begin, min(begin + size, elements)) for begin in range(0, elements, size)]


def state_of(codec: Codec, x_P: Tensor) -> list[Tensor]:
    return [torch.zeros_like(x_P) for _ in range(codec.vectors)]


def encoded(codec: Codec, x_P: Tensor, chunks: list[slice] | None = None) -> list[bytes]:
    payloads, _ = codec.encode(x_P, chunks or chunks_of(x_P.numel()), state_of(codec, x_P))
    return [bytes(payload) for payload in payloads]


def again(codec: Codec, payloads: list[bytes], chunks: list[slice], dtype: str) -> Tensor:
    out_P = torch.full((chunks[-1].stop,), float("nan"), dtype=TORCH_DTYPES[dtype])
    for payload, chunk in zip(payloads, chunks, strict=True):
        codec.decode(payload, out_P[chunk])
    return out_P


def test_every_codec_is_found_by_its_own_name_and_under_contract() -> None:
    assert {name: kind.model_fields["kind"].default for name, kind in CODECS.items()} == {n: n for n in CODECS}
    assert CODECS.keys() == RELATIVE_ERROR.keys() >= EXACT
    assert RAW.kind == messages.RAW, "records and tensors that are sent as they are have one name"


def test_its_name_travels_in_blob_references(codec: Codec) -> None:
    ref = messages.BlobRef(id="0" * 32, size=4, chunks=1, codec=codec.kind)
    assert messages.BlobRef.model_validate(ref.model_dump()) == ref


@pytest.mark.parametrize("elements", [1, 7, CHUNK, CHUNK + 1, 3 * CHUNK - 5])
def test_what_is_encoded_comes_out_again(codec: Codec, dtype: str, elements: int) -> None:
    x_P, chunks = sample(elements, dtype), chunks_of(elements)
    out_P = again(codec, encoded(codec, x_P), chunks, dtype)
    if codec.kind in EXACT:
        assert torch.equal(out_P, x_P)
    error = torch.linalg.vector_norm(out_P - x_P) / torch.linalg.vector_norm(x_P)
    assert float(error) <= RELATIVE_ERROR[codec.kind]


@pytest.mark.parametrize("elements", [1, 7, CHUNK - 1, CHUNK, 10 * CHUNK])
def test_the_size_of_a_payload_depends_on_the_number_of_elements_alone(codec: Codec, dtype: str, elements: int) -> None:
    expected = codec.payload_bytes(elements, DTYPES[dtype])
    for x_E in (sample(elements, dtype), torch.zeros(elements, dtype=TORCH_DTYPES[dtype])):
        (payload,) = encoded(codec, x_E, [slice(0, elements)])
        assert len(payload) == expected
    if elements % CHUNK == 0:
        assert expected <= elements * DTYPES[dtype].itemsize, "outboxes and streams have room for so much"


def test_chunks_are_decoded_without_each_other(codec: Codec, dtype: str) -> None:
    x_P, chunks = sample(4 * CHUNK, dtype), chunks_of(4 * CHUNK)
    payloads = encoded(codec, x_P)
    whole_P = again(codec, payloads, chunks, dtype)
    one_E = torch.empty(CHUNK, dtype=x_P.dtype)
    codec.decode(payloads[2], one_E)
    assert torch.equal(one_E, whole_P[chunks[2]])
    assert torch.equal(decoded(codec, payloads[2], CHUNK, dtype), one_E)


def test_a_slice_is_written_where_it_belongs_and_nowhere_else(codec: Codec, dtype: str) -> None:
    target_P = torch.full((4 * CHUNK,), 7.0, dtype=TORCH_DTYPES[dtype])
    codec.decode(encoded(codec, sample(CHUNK, dtype))[0], target_P[CHUNK : 2 * CHUNK])
    assert bool((target_P[:CHUNK] == 7).all()) and bool((target_P[2 * CHUNK :] == 7).all())
    assert not bool((target_P[CHUNK : 2 * CHUNK] == 7).all())


def test_it_reads_what_cannot_be_written_and_keeps_no_hold_of_it(codec: Codec, dtype: str) -> None:
    data = bytearray(encoded(codec, sample(CHUNK, dtype))[0])
    first_E, second_E = (torch.empty(CHUNK, dtype=TORCH_DTYPES[dtype]) for _ in range(2))
    codec.decode(bytes(data), first_E)
    codec.decode(memoryview(data), second_E)
    data[:] = bytes(len(data))
    assert torch.equal(first_E, second_E) and bool(first_E.any())


def test_encoding_changes_neither_the_update_nor_the_state_it_was_given(codec: Codec, dtype: str) -> None:
    x_P = sample(2 * CHUNK, dtype)
    state = [sample(2 * CHUNK, dtype, seed=i) for i in range(codec.vectors)]
    before = [tensor.clone() for tensor in (x_P, *state)]
    _, after = codec.encode(x_P, chunks_of(2 * CHUNK), state)
    assert all(torch.equal(a, b) for a, b in zip((x_P, *state), before, strict=True))
    assert len(after) == codec.vectors and all(vector_P.shape == x_P.shape for vector_P in after)


def test_the_same_update_gives_the_same_bytes(codec: Codec, dtype: str) -> None:
    assert encoded(codec, sample(3 * CHUNK, dtype)) == encoded(codec, sample(3 * CHUNK, dtype).clone())


def test_a_payload_of_another_length_is_refused(codec: Codec, dtype: str) -> None:
    (good,) = encoded(codec, sample(16, dtype))
    for wrong in (b"", good[:-1], good + b"\0", good + good):
        with pytest.raises(ValueError):
            codec.decode(wrong, torch.empty(16, dtype=TORCH_DTYPES[dtype]))


@given(st.data())
def test_no_content_does_worse_than_be_refused(data: st.DataObject) -> None:
    kind, dtype = data.draw(st.sampled_from([*product(sorted(CODECS), sorted(DTYPES))]))
    codec: Codec = CODECS[kind]()  # type: ignore[call-arg]
    size = codec.payload_bytes(16, DTYPES[dtype])
    payload = data.draw(st.binary(min_size=size, max_size=size))
    try:
        codec.decode(payload, torch.empty(16, dtype=TORCH_DTYPES[dtype]))
    except ValueError:
        assert kind not in EXACT


def test_payloads_one_behind_the_other_are_what_a_manifest_says(codec: Codec, dtype: str) -> None:
    layout = Manifest(dtype=dtype, elements=2 * CHUNK + 10, chunk_elements=CHUNK, tensors=[], sections=2)
    out = memoryview(bytearray(layout.blob_bytes))
    chunks = [layout.chunk(k) for k in range(layout.chunks)]
    written = 0
    for _ in range(layout.sections):
        x_P = sample(layout.elements, dtype)
        written += write_payloads(codec.encode(x_P, chunks, state_of(codec, x_P))[0], out[written:])
    assert written == layout.coded_bytes(codec.payload_bytes)


def test_what_it_needs_is_declared_in_known_words(codec: Codec) -> None:
    assert codec.needs <= set(Need)
    assert not codec.vectors or Need.AGENT_MEMORY in codec.needs


# -- raw ---------------------------------------------------------------------------------------------------------------
@given(st.binary(min_size=8, max_size=256), st.sampled_from(sorted(DTYPES)))
def test_raw_carries_every_bit_pattern(data: bytes, dtype: str) -> None:
    itemsize = DTYPES[dtype].itemsize
    part = data[: len(data) // itemsize * itemsize]
    x_E = torch.frombuffer(
        bytearray(part), dtype=TORCH_DTYPES[dtype]
    )  # NaNs with payloads, −0.0, denormals: all of them
    assert bytes(payload_of(RAW, x_E)) == part
    out_E = torch.empty_like(x_E)
    RAW.decode(part, out_E)
    assert out_E.numpy().tobytes() == decoded(RAW, part, x_E.numel(), dtype).numpy().tobytes() == part


def test_raw_is_little_endian_and_copies_nothing() -> None:
    x_E = torch.tensor([1.0])
    payload = payload_of(RAW, x_E)
    assert bytes(payload) == bytes.fromhex("0000803f")
    assert bytes(payload_of(RAW, x_E.double())) == bytes.fromhex("000000000000f03f")
    x_E[0] = 2.0
    assert bytes(payload) == bytes.fromhex("00000040")


# -- what a run has to provide -------------------------------------------------------------------------------------------
def test_the_contract_covers_codecs_that_keep_vectors() -> None:
    """A stateful codec is possible: the residual of one encoding enters the next one."""

    class Halved(Codec):
        kind: str = "halved"
        vectors = 1

        def payload_bytes(self, elements: int, dtype: Dtype) -> int:
            return elements * dtype.itemsize

        def encode(self, update_P: Tensor, chunks: Any, state: Any) -> Any:
            sent_P = (update_P + state[0]) / 2
            return RAW.encode(sent_P, chunks, ())[0], [update_P + state[0] - sent_P]

        def decode(self, payload: bytes | memoryview, out_E: Tensor) -> None:
            RAW.decode(payload, out_E)

    codec, x_P, state, sent_P = (
        Halved(),
        sample(CHUNK, "fp64"),
        [torch.zeros(CHUNK).double()],
        torch.zeros(CHUNK).double(),
    )
    for _ in range(3):
        payloads, state = codec.encode(x_P, chunks_of(CHUNK), state)
        sent_P += again(codec, [bytes(p) for p in payloads], chunks_of(CHUNK), "fp64")
    assert torch.allclose(sent_P + state[0], 3 * x_P)
