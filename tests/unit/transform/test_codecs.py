"""One contract for every codec: so many bytes, written where they belong, and read again with the error it states."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from syncline.model.manifest import Manifest
from syncline.transform.codecs import CODECS, Codec

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}  # that a codec carries
EXACT = {"fp32", "fp64"}  # to the last bit


@pytest.fixture(params=sorted(CODECS))
def codec(request: pytest.FixtureRequest) -> Codec:
    return CODECS[request.param]


def sample(codec: Codec, elements: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(elements, generator=generator, dtype=DTYPES[codec.name])


def encoded(codec: Codec, x: Tensor) -> memoryview:
    out = memoryview(bytearray(codec.nbytes(x.numel())))
    codec.encode(x, out)
    return out


def decoded(codec: Codec, data: bytes | memoryview, elements: int) -> Tensor:
    out = torch.full((elements,), float("nan"), dtype=DTYPES[codec.name])
    codec.decode(data, out)
    return out


def test_a_codec_is_found_by_its_own_name(codec: Codec) -> None:
    assert CODECS[codec.name] is codec


def test_every_codec_is_under_contract() -> None:
    assert set(CODECS) == set(DTYPES)


@pytest.mark.parametrize("elements", [0, 1, 7, 1024])
def test_what_is_encoded_comes_out_again(codec: Codec, elements: int) -> None:
    x = sample(codec, elements)
    again = decoded(codec, encoded(codec, x), elements)
    assert torch.equal(again, x) if codec.name in EXACT else torch.allclose(again, x, atol=0.1)


def test_it_reads_what_cannot_be_written_and_keeps_no_hold_of_it(codec: Codec) -> None:
    x = sample(codec, 16)
    data = encoded(codec, x)
    again = decoded(codec, bytes(data), 16)
    also = decoded(codec, memoryview(data), 16)
    data[:] = bytes(len(data))
    assert torch.equal(again, also) and bool(again.any())


def test_it_leaves_the_tensor_it_encodes_alone(codec: Codec) -> None:
    x = sample(codec, 16)
    before = x.clone()
    encoded(codec, x)
    assert torch.equal(x, before)


def test_it_works_on_slices_of_a_longer_vector(codec: Codec) -> None:
    whole = sample(codec, 64)
    target = torch.zeros_like(whole)
    codec.decode(encoded(codec, whole[16:32]), target[16:32])
    assert torch.equal(target[16:32], decoded(codec, encoded(codec, whole[16:32]), 16))
    assert not target[:16].any() and not target[32:].any()


def test_a_wrong_number_of_bytes_is_our_own_bug_and_raises(codec: Codec) -> None:
    data = encoded(codec, sample(codec, 16))
    for wrong in (data[:-1], data[: codec.nbytes(15)], bytes(data) + b"\0" * 8):
        with pytest.raises(ValueError):
            decoded(codec, wrong, 16)


def test_the_same_tensor_gives_the_same_bytes(codec: Codec) -> None:
    assert encoded(codec, sample(codec, 100)) == encoded(codec, sample(codec, 100).clone())


# -- the exact ones ----------------------------------------------------------------------------------------------------
@given(st.binary(min_size=8, max_size=256))
def test_exact_codecs_carry_every_bit_pattern(data: bytes) -> None:
    for name in sorted(EXACT):
        codec = CODECS[name]
        part = data[: len(data) // codec.nbytes(1) * codec.nbytes(1)]
        x = torch.frombuffer(bytearray(part), dtype=DTYPES[name])  # NaNs with payloads, −0.0, denormals: all of them
        assert encoded(codec, x) == part
        assert decoded(codec, part, x.numel()).numpy().tobytes() == part


def test_exact_codecs_are_little_endian() -> None:
    assert encoded(CODECS["fp32"], torch.tensor([1.0])) == bytes.fromhex("0000803f")
    assert encoded(CODECS["fp64"], torch.tensor([1.0], dtype=torch.float64)) == bytes.fromhex("000000000000f03f")


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_manifest_names_its_codec_by_its_dtype(dtype: str) -> None:
    layout = Manifest(dtype=dtype, elements=10, chunk_elements=1024, tensors=[])
    assert CODECS[layout.dtype].nbytes(layout.elements) == layout.nbytes
