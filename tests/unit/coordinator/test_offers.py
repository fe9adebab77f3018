"""The reader of offers: an offer passes as its agent signed it, and with any field changed it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any, get_args

import nkeys
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.utils import random as random_bytes
from pydantic import BaseModel
from torch import nn

from syncline.bus.base import Stored
from syncline.errors import PeerError
from syncline.model.flat import manifest_of
from syncline.transform.codecs import RAW
from syncline.wire import subjects
from syncline.wire.messages import BlobRef, Offer, Record, encode
from syncline.wire.signing import Signer, verify
from syncline_coordinator.offers import OfferReader

RUN, AGENT = "run-1", "a1"
LAYOUT = manifest_of(nn.Linear(30, 30), 4096)


def new_signer() -> Signer:
    return Signer(nkeys.encode_seed(random_bytes(32), nkeys.PREFIX_BYTE_USER).decode())


SIGNER, STRANGER = new_signer(), new_signer()


def offer_of(**fields: Any) -> Offer:
    blob = BlobRef(id="b" * 32, size=LAYOUT.blob_bytes, chunks=LAYOUT.blob_chunks)
    known = {"session": "5" * 32, "clock": 4, "base": 7, "term": 2, "samples": 449, "steps": 20, "digest": b"d" * 32}
    return Offer(**{**known, "blob": blob, **fields})


def signed(offer: Offer, signer: Signer = SIGNER, *, run: str = RUN, agent: str = AGENT) -> Offer:
    return offer.model_copy(update={"signature": signer.sign(offer.signed_bytes(run, agent))})


class OneOffer:
    """A bus with one message in the stream of offers, and a subscription to hear of more."""

    losses = 0

    def __init__(self, offer: Offer) -> None:
        self._stored = Stored(subjects.offer(RUN, AGENT), encode(offer), 1, 0.0)

    async def subscribe(self, *_: Any, **__: Any) -> OneOffer:
        return self

    async def unsubscribe(self) -> None: ...

    async def read(self, *_: Any) -> list[Stored]:
        return [self._stored]


async def read(offer: Offer, public_key: str = SIGNER.public_key) -> Offer | PeerError:
    """What the coordinator makes of an offer by an agent that said hello with this key."""

    async def nothing_lost() -> None: ...

    bus: Any = OneOffer(offer)
    offers = OfferReader(bus, RUN, LAYOUT, RAW, lambda agent: public_key).read(0, nothing_lost)
    try:
        return (await anext(offers))[1]
    finally:
        await offers.aclose()


def leaves(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every field, those of records inside included. A field added later is found too."""
    for name, field in model.model_fields.items():
        kinds = [k for k in (field.annotation, *get_args(field.annotation)) if isinstance(k, type)]
        inside = [k for k in kinds if issubclass(k, BaseModel)]
        if inside:
            yield from leaves(inside[0], (*path, name))
        else:
            yield (*path, name)


FIELDS = [path for path in leaves(Offer) if path != ("signature",)]


def others(value: Any) -> st.SearchStrategy[Any]:
    """Values of the same type and length that differ."""
    match value:
        case bool():
            found: st.SearchStrategy[Any] = st.just(not value)
        case int():
            found = st.integers(0, (1 << 63) - 1)
        case float():
            found = st.floats(0, 1e9)
        case str():
            found = st.text("0123456789abcdef", min_size=len(value), max_size=len(value))  # ids; a codec's name
        case bytes():
            found = st.binary(min_size=len(value), max_size=len(value))
        case _:
            raise NotImplementedError(f"say here which other values a field of {type(value).__name__} can have")
    return found.filter(lambda other: other != value)


def with_field(record: Record, path: tuple[str, ...], value: Any) -> Record:
    name, *inside = path
    if inside:
        value = with_field(getattr(record, name), tuple(inside), value)
    return record.model_copy(update={name: value})


offers = st.builds(
    offer_of,
    epoch=st.integers(0, (1 << 63) - 1) | st.just(0),
    seconds=st.floats(0, 1e9) | st.just(0.0),
    term=st.integers(0, 9),
    samples=st.integers(0, 9),
)


def test_every_field_is_tried() -> None:
    assert {path[0] for path in FIELDS} == Offer.model_fields.keys() - {"signature"}
    assert ("blob", "id") in FIELDS and ("term",) in FIELDS and ("epoch",) in FIELDS


async def test_an_offer_passes_as_its_agent_signed_it() -> None:
    offer = signed(offer_of(epoch=77, seconds=0.5))
    assert await read(offer) == offer
    assert await read(signed(offer_of())) == signed(offer_of())


@pytest.mark.parametrize("path", FIELDS, ids=".".join)
@given(data=st.data())
async def test_no_field_can_be_changed_without_the_key(path: tuple[str, ...], data: st.DataObject) -> None:
    offer = signed(data.draw(offers))
    value = data.draw(others(reduce(getattr, path, offer)))
    changed = with_field(offer, path, value)
    assert isinstance(changed, Offer)
    assert not verify(SIGNER.public_key, changed.signed_bytes(RUN, AGENT), changed.signature)
    assert isinstance(await read(changed), PeerError)


@pytest.mark.parametrize(
    "forged",
    [
        offer_of(),
        offer_of(signature=bytes(64)),
        signed(offer_of(), STRANGER),
        signed(offer_of(), agent="a2"),
        signed(offer_of(), run="run-2"),
    ],
    ids=["unsigned", "zeros", "another-key", "another-agent", "another-run"],
)
async def test_a_signature_of_another_agent_run_or_key_is_refused(forged: Offer) -> None:
    refused = await read(forged)
    assert isinstance(refused, PeerError) and "signature" in str(refused)


async def test_an_update_in_another_codec_or_of_another_size_is_refused() -> None:
    blob = offer_of().blob
    for change, problem in (
        ({"codec": "topk"}, "its update is coded by 'topk', the run's is 'raw'"),
        ({"size": blob.size - 1}, f"expected {blob.size} bytes"),
        ({"chunks": blob.chunks + 1}, f"in {blob.chunks + 1} chunks"),
    ):
        refused = await read(signed(offer_of(blob=blob.model_copy(update=change))))
        assert isinstance(refused, PeerError) and problem in str(refused)


@pytest.mark.parametrize("cut", [0, 1, 63])
async def test_a_signature_that_is_cut_is_refused(cut: int) -> None:
    offer = signed(offer_of())
    assert isinstance(await read(offer.model_copy(update={"signature": offer.signature[:cut]})), PeerError)


def test_fields_with_their_default_are_left_out_of_what_is_signed() -> None:
    """So that a field which a later minor version adds changes no signature of an agent that does not know it."""
    plain = offer_of().signed_bytes(RUN, AGENT)
    assert b"epoch" not in plain and b"seconds" not in plain and b"term" in plain
    assert offer_of(epoch=0, seconds=0.0).signed_bytes(RUN, AGENT) == plain
