"""Control records: every one comes out as it went in, and whatever else arrives is a PeerError that says what is wrong."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from syncline.errors import PeerError
from syncline.model.manifest import Manifest
from syncline.wire.messages import (
    HEAD_REASON_BYTES,
    MAX_HEAD_BYTES,
    MESSAGES,
    PLAN_INLINE_BYTES,
    REMEMBERED,
    BlobRef,
    Committed,
    Head,
    Heartbeat,
    Hello,
    LogLine,
    Notify,
    Offer,
    Plan,
    PlanEntry,
    Presence,
    Record,
    Roster,
    Stop,
    Stopped,
    Story,
    StoryTold,
    Submit,
    Submitted,
    Verdict,
    Welcome,
    decode,
    encode,
)

ID = "0123456789abcdef" * 2
BLOB = BlobRef(id=ID, size=4096, chunks=1)
ENTRY = PlanEntry(agent="a1", clock=4, weight=0.25, blob=BLOB, digest=b"d" * 32)
PLAN = Plan(version=8, reason="4 of 4", merged=[ENTRY], late=["a2"])
EXAMPLES: dict[type[Record], Record] = {
    type(r): r
    for r in (
        Hello(session=ID, tasks=["syncline.tasks.*"]),
        Welcome(run="r", reason="welcome"),
        Heartbeat(session=ID, clock=3, progress=60, state="training"),
        Offer(session=ID, clock=4, base=7, term=1, samples=449, steps=20, blob=BLOB, digest=b"d" * 32),
        PLAN,
        Roster(parts=2, agents=["a1", "a2"], clocks=[4, 3], flags=bytes([3, 4]), presence=bytes([1, 2])),
        Head(run="r", term=1, version=7, phase="training", digest=ID, model=BLOB, plan=b"plan"),
        Notify(head=b"head", roster=b"roster"),
        Submit(spec={"task": "a.b:C", "local": {"steps": 5}}),
        Submitted(run="r", warnings=["w"]),
        Stop(run="r", by="ann@hub"),
        Stopped(run="r", outcome="ended", reason="40 versions"),
        Story(run="r", agent="a1"),
        StoryTold(run="r", known=True, lines=["1 +0.00 s: a1 joined"]),
        Committed(
            run="r",
            term=1,
            version=8,
            digest=ID,
            model=BLOB,
            plan=PLAN,
            bytes_up=1,
            bytes_down=2,
            norms=[3.0],
            norm=3.0,
            phases_s={"merge": 0.5},
        ),
        LogLine(version=8, term=1, model=BLOB, record=b"record"),
        Manifest(dtype="fp32", elements=6, chunk_elements=1024, tensors=[], local=["steps"]),
    )
}
KINDS = sorted(EXAMPLES, key=lambda model: model.kind)
every_record = pytest.mark.parametrize("model", KINDS, ids=lambda model: model.kind)


def packed(model: type[Record], /, **fields: Any) -> bytes:
    """The example as it travels, but for these fields."""
    data: bytes = msgpack.packb({**msgpack.unpackb(encode(EXAMPLES[model])), **fields})
    return data


def refused(model: type[Record], data: bytes, **options: Any) -> str:
    with pytest.raises(PeerError) as error:
        decode(model, data, **options)
    return str(error.value)


def instances(schema: dict[str, Any], parts: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a JSON schema of pydantic's allows, as msgpack would hold them."""
    if "$ref" in schema:
        return instances(parts[schema["$ref"].rpartition("/")[2]], parts)
    if "anyOf" in schema:
        return st.one_of([instances(s, parts) for s in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    least, most = schema.get("minLength", 0), min(schema.get("maxLength", 80), 80)
    match schema.get("type"):
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            top = schema.get("maximum", schema.get("exclusiveMaximum", 1 << 63) - 1)
            return st.integers(schema.get("minimum", 0), top)
        case "number":
            lowest, highest = schema.get("minimum"), schema.get("maximum")
            return st.floats(lowest, highest, allow_nan=False, allow_infinity=False)
        case "string" if schema.get("format") == "binary":
            return st.binary(min_size=least, max_size=most)
        case "string" if "pattern" in schema:
            return st.from_regex(schema["pattern"].replace("$", r"\Z")).filter(lambda text: len(text) <= most)
        case "string":
            return st.text(min_size=least, max_size=most)
        case "array":
            return st.lists(instances(schema["items"], parts), max_size=min(schema.get("maxItems", 3), 3))
        case "object" if "properties" in schema:
            required = {k: instances(v, parts) for k, v in schema["properties"].items() if k in schema["required"]}
            others = {k: instances(v, parts) for k, v in schema["properties"].items() if k not in required}
            return st.fixed_dictionaries(required, optional=others)
        case "object":
            values = schema.get("additionalProperties")
            inner = instances(values, parts) if isinstance(values, dict) else st.recursive(
                st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=5),
                lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
                max_leaves=5,
            )  # fmt: skip
            return st.dictionaries(st.text(max_size=10), inner, max_size=3)
    raise AssertionError(schema)


def any_of(model: type[Record]) -> st.SearchStrategy[Record]:
    if model is Roster:
        agents = st.tuples(st.sampled_from(["a1", "b-2", "c" * 63]), st.integers(0, (1 << 63) - 1), st.integers(0, 19))
        return st.lists(agents, max_size=5).map(
            lambda rows: Roster(
                parts=max(1, len(rows)),
                agents=[name for name, _, _ in rows],
                clocks=[clock for _, clock, _ in rows],
                flags=bytes(flag % 8 for _, _, flag in rows),
                presence=bytes(flag % 5 for _, _, flag in rows),
            )
        )
    schema = model.model_json_schema()
    return instances(
        {"required": [], **schema}, {k: {"required": [], **v} for k, v in schema.get("$defs", {}).items()}
    ).map(model.model_validate)


STRATEGIES = {model: any_of(model) for model in KINDS}


# -- what goes in comes out --------------------------------------------------------------------------------------------
def test_every_message_has_an_example_here_and_a_kind_of_its_own() -> None:
    assert set(MESSAGES) | {Manifest} == set(EXAMPLES)
    assert len({model.kind for model in EXAMPLES}) == len(EXAMPLES) and all(model.kind for model in EXAMPLES)


@every_record
@settings(max_examples=40)
@given(st.data())
def test_every_record_comes_out_as_it_went_in(model: type[Record], data: st.DataObject) -> None:
    record = data.draw(STRATEGIES[model])
    assert decode(model, encode(record)) == record


def test_a_part_of_a_message_does_not_travel_alone() -> None:
    with pytest.raises(AssertionError, match="BlobRef is a part, not a message"):
        encode(BLOB)


@every_record
def test_fields_of_a_newer_minor_version_are_ignored(model: type[Record]) -> None:
    assert decode(model, packed(model, a_later_field={"of": [1, 2, 3]}, **{"": b"\xff"})) == EXAMPLES[model]


def test_unknown_fields_of_parts_are_ignored_too() -> None:
    assert decode(Offer, packed(Offer, blob={**BLOB.model_dump(), "compressed": True})) == EXAMPLES[Offer]


# -- what is refused, and with which words -----------------------------------------------------------------------------
@every_record
def test_another_kind_of_record_is_refused(model: type[Record]) -> None:
    assert refused(model, packed(model, t="chunk")) == f"{model.kind}: a record of type 'chunk'"
    assert refused(model, packed(model, t=None)) == f"{model.kind}: a record of type None"
    other = next(m for m in KINDS if m is not model)
    assert refused(model, encode(EXAMPLES[other])) == f"{model.kind}: a record of type {other.kind!r}"


@every_record
def test_a_newer_major_version_is_refused(model: type[Record]) -> None:
    assert refused(model, packed(model, v=2)) == f"{model.kind}: version 2, this Syncline reads version 1"
    assert refused(model, packed(model, v=None)) == f"{model.kind}: version None, this Syncline reads version 1"
    assert refused(model, packed(model, v="1")) == f"{model.kind}: version '1', this Syncline reads version 1"


@every_record
def test_a_record_that_is_too_long_is_refused_unread(model: type[Record]) -> None:
    junk = b"\xc1" * (model.max_bytes + 1) if model.max_bytes < 1 << 24 else b""
    limit = model.max_bytes if junk else -1
    assert refused(model, junk, limit=limit) == f"{model.kind}: {len(junk)} bytes are more than the {limit} allowed"
    size = len(encode(EXAMPLES[model]))
    assert decode(model, encode(EXAMPLES[model]), limit=size) and refused(
        model, encode(EXAMPLES[model]), limit=size - 1
    )


@every_record
def test_a_record_cut_off_anywhere_is_refused(model: type[Record]) -> None:
    whole = encode(EXAMPLES[model])
    for end in range(len(whole)):
        assert refused(model, whole[:end]).startswith(f"{model.kind}: not msgpack: ")
    assert refused(model, whole + b"\x00").startswith(f"{model.kind}: not msgpack: ")


@pytest.mark.parametrize(
    ("junk", "problem"),
    [
        (b"", "not msgpack: Unpack failed: incomplete input"),
        (b"\xc1", "not msgpack: FormatError"),
        (b"\xa2\xff\xfe", "not msgpack: 'utf-8' codec can't decode"),
        (b"\x81\x01\x02", "not msgpack: int is not allowed for map key"),
        (b"\xd4\x01\x00", "not msgpack: "),  # an extension type
        (b"\xdd\xff\xff\xff\xff", "not msgpack: "),  # an array that says it has four thousand million elements
        (b"\xc0", "a NoneType, not a map"),
        (b"\x93\x01\x02\x03", "a list, not a map"),
        (b"\x80", "a record of type None"),
    ],
)
def test_what_is_no_record_is_refused(junk: bytes, problem: str) -> None:
    assert refused(Head, junk).startswith(f"head: {problem}")


WRONG: tuple[Any, ...] = (None, True, -1, 1 << 63, 2.5, math.nan, "\0", "x" * 3000, b"", [], [[]], {}, {"id": 5})


@every_record
def test_a_field_of_the_wrong_type_is_named(model: type[Record]) -> None:
    for name in model.model_fields:
        problems = []
        for value in WRONG:
            try:
                decode(model, packed(model, **{name: value}))
            except PeerError as error:
                problems.append(str(error))
        assert len(problems) >= 5, f"{name} takes almost anything"
        by_name = [p for p in problems if p.startswith(f"{model.kind}: {name}")]
        assert len(by_name) == len(problems) or (model is Roster and name in ("agents", "clocks", "flags", "presence"))


@every_record
def test_a_missing_field_is_named(model: type[Record]) -> None:
    for name, field in model.model_fields.items():
        if field.is_required():
            fields = msgpack.unpackb(encode(EXAMPLES[model]))
            del fields[name]
            assert refused(model, msgpack.packb(fields)) == f"{model.kind}: {name}: Field required"


def test_a_wrong_field_of_a_part_is_named_by_its_path() -> None:
    assert refused(Offer, packed(Offer, blob={**BLOB.model_dump(), "chunks": 0})) == (
        "offer: blob.chunks: Input should be greater than or equal to 1"
    )
    entry = {**ENTRY.model_dump(), "weight": math.inf}
    assert refused(Plan, packed(Plan, merged=[entry])) == "plan: merged.0.weight: Input should be a finite number"


def test_values_are_not_bent_to_fit() -> None:
    for field, value in (
        ("clock", "4"),
        ("clock", 4.0),
        ("clock", True),
        ("session", ID.encode()),
        ("digest", "d" * 32),
    ):
        assert refused(Offer, packed(Offer, **{field: value})).startswith(f"offer: {field}: ")


@pytest.mark.parametrize("name", ["", "A", "a.b", "a b", "a\n", "ä", "a" * 64])
def test_what_is_no_name_is_no_name_here_either(name: str) -> None:
    assert refused(Head, packed(Head, run=name)).startswith("head: run: ")


@pytest.mark.parametrize("depth", [100, 1000, 1023, 5000])
def test_nesting_too_deep_to_print_is_refused_like_anything_else(depth: int) -> None:
    nested = b"\x91" * depth + b"\xc0"
    for data in (
        b"\x81\xa1t" + nested,
        b"\x82\xa1t\xa4head\xa1v" + nested,
        b"\x83\xa1t\xa4head\xa1v\x01\xa3run" + nested,
    ):
        assert refused(Head, data).startswith("head: ")


# -- fuzz --------------------------------------------------------------------------------------------------------------
@settings(max_examples=300)
@given(st.sampled_from(KINDS), st.binary(max_size=300))
def test_random_bytes_are_refused(model: type[Record], junk: bytes) -> None:
    refused(model, junk)


@settings(max_examples=500)
@given(st.sampled_from(KINDS), st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=5)), min_size=1, max_size=5))
def test_a_mutated_record_is_a_record_or_refused(model: type[Record], cuts: list[tuple[int, bytes]]) -> None:
    data = encode(EXAMPLES[model])
    for place, instead in cuts:
        place %= len(data) or 1
        data = data[:place] + instead + data[place + 1 :]
    try:
        assert type(decode(model, data)) is model
    except PeerError as error:
        assert str(error).startswith(f"{model.kind}: ")


SCALARS = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary()
FIELDS = [(model, field) for model in KINDS for field in model.model_fields]


@settings(max_examples=200)
@given(
    st.sampled_from(FIELDS),
    SCALARS
    | st.lists(SCALARS, max_size=3)
    | st.dictionaries(st.sampled_from(["id", "size", "agent"]), SCALARS, max_size=3),
)
def test_a_record_with_any_value_in_a_field_is_a_record_or_refused(at: tuple[type[Record], str], value: Any) -> None:
    model, field = at
    try:
        decode(model, packed(model, **{field: value}))
    except PeerError as error:
        assert str(error).startswith(f"{model.kind}: ")


# -- head --------------------------------------------------------------------------------------------------------------
LARGEST = (1 << 63) - 1
WIDE = "\U0001f9e0"  # four bytes in UTF-8
LARGEST_BLOB = BlobRef(id="f" * 32, size=LARGEST, chunks=1 << 24)
LARGEST_HEAD = Head(
    run="r" * 63,
    term=LARGEST,
    version=LARGEST,
    round=LARGEST,
    epoch=LARGEST,
    gate=LARGEST,
    phase="training",
    digest="f" * 32,
    model=LARGEST_BLOB,
    previous=LARGEST_BLOB,
    manifest=LARGEST_BLOB,
    roster=LARGEST_BLOB,
    plan=b"p" * PLAN_INLINE_BYTES,
    offers_seq=LARGEST,
    reason=WIDE * HEAD_REASON_BYTES,
)


def test_the_largest_head_there_can_be_is_below_its_limit() -> None:
    data = encode(LARGEST_HEAD)
    assert len(data) < MAX_HEAD_BYTES
    assert set(msgpack.unpackb(data)) - {"t", "v"} == set(Head.model_fields), "a new field belongs in this test"
    assert decode(Head, data) == LARGEST_HEAD.model_copy(update={"reason": WIDE * (HEAD_REASON_BYTES // 4)})


def test_no_field_of_head_can_be_larger_than_in_that_test() -> None:
    fields = LARGEST_HEAD.model_dump() | {"reason": "r" * HEAD_REASON_BYTES}
    for name, value in fields.items():
        larger: Any = None
        if isinstance(value, int):
            larger = value + 1
        elif isinstance(value, str):
            larger = value + "r"
        elif isinstance(value, bytes):
            larger = value + b"r"
        if larger is not None:
            with pytest.raises(ValidationError, match=f"\n{name}"):
                Head.model_validate({**fields, name: larger})
    assert len(max(Head.model_fields["phase"].annotation.__args__, key=len)) == len("training")  # type: ignore[union-attr]


def test_a_reason_of_any_length_is_cut_off_between_characters() -> None:
    for reason in ("x" * 99_999, "ä" * 99_999, "x" + WIDE * 99_999, "\udcff" * 5000):
        told = decode(Head, encode(EXAMPLES[Head].model_copy(update={"reason": reason}))).reason
        assert HEAD_REASON_BYTES - 3 <= len(told.encode()) <= HEAD_REASON_BYTES


def test_a_reason_that_fits_is_kept() -> None:
    head = EXAMPLES[Head].model_copy(update={"reason": "4 of 4 ✓"})
    assert decode(Head, encode(head)) == head


def test_a_notify_takes_the_largest_head() -> None:
    note = Notify(head=encode(LARGEST_HEAD), roster=b"r" * 64 * 1024)
    assert decode(Notify, encode(note)) == note


# -- rosters and plans of the largest fleets ---------------------------------------------------------------------------
def test_a_roster_of_a_hundred_thousand_agents_costs_sixteen_bytes_each_beside_the_names() -> None:
    n = 100_000
    names = [f"agent-{i:06}" for i in range(n)]
    roster = Roster(parts=n, agents=names, clocks=[1 << 40] * n, flags=bytes([3]) * n, presence=bytes([1]) * n)
    data = encode(roster)
    assert len(data) < n * (16 + len(names[0])) and decode(Roster, data) == roster
    head = encode(EXAMPLES[Head].model_copy(update={"roster": BlobRef(id=ID, size=len(data), chunks=4)}))
    assert len(head) < 500


def test_a_plan_of_thousands_of_updates_is_a_record_too() -> None:
    plan = PLAN.model_copy(update={"merged": [ENTRY] * 10_000})
    assert len(encode(plan)) > 1 << 20 and decode(Plan, encode(plan)) == plan


def test_columns_of_a_roster_are_equally_long() -> None:
    for field, value in (("agents", ["a1"]), ("clocks", [1, 2, 3]), ("flags", b"\x00"), ("presence", b"\x01")):
        assert refused(Roster, packed(Roster, **{field: value})) == (
            "roster: Value error, agents, clocks, flags, presence and offsets differ in length"
        )


def test_a_roster_holds_presence_participant_and_verdict() -> None:
    rows = [(here, taking, verdict) for here in Presence for taking in (False, True) for verdict in Verdict]
    roster = Roster(
        parts=1,
        agents=[f"a{i}" for i in range(len(rows))],
        clocks=[0] * len(rows),
        flags=bytes(Roster.flag(taking, verdict) for _, taking, verdict in rows),
        presence=bytes(here for here, _, _ in rows),
    )
    roster = decode(Roster, encode(roster))
    assert [(roster.state(i), roster.participant(i), roster.verdict(i)) for i in range(len(rows))] == rows
    assert roster.number("a3") == 3 and roster.number("b") is None


def test_a_flag_holds_which_of_the_clocks_before_were_merged() -> None:
    flags = bytes(Roster.flag(True, Verdict.BROKEN, merged) for merged in range(1 << REMEMBERED))
    n = len(flags)
    roster = Roster(parts=1, agents=[f"a{i}" for i in range(n)], clocks=[9] * n, flags=flags, presence=bytes(n))
    assert decode(Roster, encode(roster)) == roster
    assert [roster.merged_before(i) for i in range(len(flags))] == [*range(1 << REMEMBERED)]
    assert {roster.verdict(i) for i in range(len(flags))} == {Verdict.BROKEN}


@pytest.mark.parametrize("flag", [4 << 1, 1 << 7])
def test_a_flag_with_an_unknown_verdict_or_bit_is_refused(flag: int) -> None:
    assert refused(Roster, packed(Roster, flags=bytes([3, flag]))) == (
        f"roster: Value error, flags hold {flag:#04x}, with an unknown verdict or bit"
    )


def test_an_unknown_presence_is_refused() -> None:
    assert refused(Roster, packed(Roster, presence=bytes([1, 5]))) == (
        "roster: Value error, presence holds 5, and the largest state is 4"
    )


# -- signatures --------------------------------------------------------------------------------------------------------
def test_what_an_agent_signs_depends_on_all_that_says_what_the_update_is_and_whose() -> None:
    offer = EXAMPLES[Offer]
    assert isinstance(offer, Offer)
    changes: list[dict[str, Any]] = [
        {"session": "f" * 32}, {"clock": 5}, {"base": 6}, {"samples": 1}, {"steps": 1}, {"digest": b"e" * 32},
        {"term": 2}, {"epoch": 1}, {"seconds": 0.5},
        *({"blob": BLOB.model_copy(update=u)} for u in ({"id": "f" * 32}, {"size": 1}, {"chunks": 2})),
    ]  # fmt: skip
    signed = {offer.model_copy(update=change).signed_bytes("r", "a1") for change in changes}
    signed |= {offer.signed_bytes("r", "a1"), offer.signed_bytes("r", "a2"), offer.signed_bytes("s", "a1")}
    assert len(signed) == len(changes) + 3
    assert offer.model_copy(update={"signature": b"s"}).signed_bytes("r", "a1") == offer.signed_bytes("r", "a1")
