"""Print docs/protocol.md from the code: `python tools/protocol_reference.py`. A test compares the page with this output.

The tables come from the records, subjects, metrics and permissions themselves; only writers and readers are named here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel

from syncline.bus.server.accounts import MAX_PAYLOAD_BYTES, Identity, accounts_config
from syncline.model.manifest import ALIGN_ELEMENTS, Entry, Manifest, NamedDigest
from syncline.observe.telemetry import (
    METRICS,
    AgentEval,
    CenterEval,
    Event,
    FleetStatus,
    Published,
    Round,
    RunStatus,
    Train,
)
from syncline.wire import subjects
from syncline.wire.chunks import FRAME_OVERHEAD_BYTES
from syncline.wire.messages import (
    DIGEST_BYTES,
    MESSAGES,
    PLAN_INLINE_BYTES,
    VERSION,
    BlobRef,
    Dropped,
    PlanEntry,
    Record,
    Verdict,
)

RUN, AGENT, WHO, BLOB, K = "<run>", "<agent>", "<sender>", "<blob>", "<k>"

INTRO = f"""# The protocol

<!-- Written by `make docs` from the code; changes made by hand are lost. -->

This page describes the messages on the bus, for services in other languages and for dashboards. All subjects are below
`{subjects.PREFIX}`, with one token per name, so that the broker can restrict each service to its own subjects.

Three kinds of messages exist:

- **records**, small maps of msgpack, describe offers, verdicts and versions;
- **chunks**, frames of one msgpack map with tensor bytes, carry models and updates. They are *put* into JetStream and *got*
  by subject, a window at a time; no tensor is pushed to a subscriber;
- **metrics and events** are JSON, for people: `nats sub '{subjects.PREFIX}.*.metrics.>'`.

Nothing is ever unpickled. Every length has a limit, and a name is `{subjects.NAME.pattern}`. A message that breaks a rule is
counted, reported on the events subject with the name of its sender, and dropped.
"""

VERSIONING = f"""## Versions

Every record and every chunk carries `t`, its type, and `v`, its major version, now {VERSION}.

- A reader ignores unknown fields, so that a newer minor version may add fields; a new field has a default.
- Another type, or another major version, is refused with an error that names both versions.
- A field of the wrong type, or beyond its limit, is refused; values are never converted.
- Subjects carry the major version of their layout: `{subjects.PREFIX}`.
- A run spec has a version of its own, `v`, and is refused by a Syncline that is older than it.

The type tag is a safety measure too: an attacker who chooses the reply subject of a request can make the broker deliver a
genuine record of one type in the place of another. The tag makes the reader refuse this record.
"""

# subject, written by, read by, carries
SUBJECTS = (
    (subjects.hello(AGENT), "agent", "coordinator", "`hello`, a request; the reply is a `welcome`"),
    (subjects.heartbeat(RUN, AGENT), "agent", "coordinator", "`heartbeat`, a request; the reply is a `welcome`"),
    (f"{subjects.update_prefix(RUN, AGENT, BLOB)}.{K}", "agent", "coordinator", "chunk k of an update; JetStream"),
    (subjects.offer(RUN, AGENT), "agent", "coordinator", "`offer`; JetStream"),
    (f"{subjects.model_prefix(RUN, BLOB)}.{K}", "coordinator", "everybody", "chunk k of a model or record; JetStream"),
    (f"{subjects.outer_prefix(RUN, BLOB)}.{K}", "coordinator", "coordinator", "chunk k of outer state; JetStream"),
    (
        f"{subjects.PREFIX}.{RUN}.probe",
        "coordinator",
        "",
        "no message: a stream is made for it and deleted at once, to learn whether a queued run would have space",
    ),
    (f"{subjects.PREFIX}.{RUN}.log.<version>.<term>", "coordinator", "anybody in `CORE`", "`log-line`; JetStream"),
    (
        f"{subjects.PREFIX}.{RUN}.log.<version>.<term>.{BLOB}.{K}",
        "coordinator",
        "anybody in `CORE`",
        "a chunk of a `committed` record that is too large for its line; JetStream",
    ),
    (subjects.notify(RUN), "coordinator", "agents", "`notify`, a hint that head has moved"),
    (subjects.submit(), "anybody in `CORE`", "coordinator", "`submit`, a request; the reply is a `submitted`"),
    (subjects.stop(), "anybody in `CORE`", "coordinator", "`stop`, a request; the reply is a `stopped`"),
    (subjects.story(), "anybody in `CORE`", "coordinator", "`story`, a request; the reply is a `story-told`"),
    (subjects.metrics(RUN, WHO, "<kind>"), "agents, coordinator", "anybody", "a metric, JSON"),
    (subjects.events(RUN, WHO), "agents, coordinator", "anybody", "an event, JSON"),
)

# object, holds, written by, how
BUCKET = f"bucket `{subjects.RUNS_BUCKET}`, key"
WRITE_ONCE = "a subject holds one message for ever"
OBJECTS = (
    (f"{BUCKET} `{subjects.spec_key(RUN)}`", "the run spec, a `submit`", "coordinator", "written once"),
    (
        f"{BUCKET} `{subjects.head_key(RUN)}`",
        "`head`",
        "coordinator",
        "changed by compare-and-set on its revision alone",
    ),
    (
        f"stream `{subjects.updates_stream(RUN)}`",
        f"chunks of updates, `{subjects.every_update(RUN)}`",
        "agents",
        f"{WRITE_ONCE}; purged once judged",
    ),
    (
        f"stream `{subjects.offers_stream(RUN)}`",
        "offers, in the order they are judged",
        "agents",
        "the oldest go first",
    ),
    (
        f"stream `{subjects.model_stream(RUN)}`",
        "chunks of models, rosters, manifests, plans and outer state",
        "coordinator",
        f"{WRITE_ONCE}; the latest versions are kept",
    ),
    (
        f"stream `{subjects.log_stream(RUN)}`",
        "one line for each commit, and the chunks of records too large for their line",
        "coordinator",
        "kept after the run, all of it; sized for every version of the run, and refuses more",
    ),
)

CHUNK = (
    ("t", "text", "`chunk`"),
    ("v", "integer", f"{VERSION}"),
    ("blob", "32 hexadecimal digits", "the blob to which the chunk belongs, as in its subject"),
    ("k", "integer", "its place in the blob, from 0, as in its subject"),
    ("n", "integer", "chunks of the blob"),
    ("codec", "text", "as in the blob's reference: how tensor elements became `data`; `raw` for records"),
    ("crc", "integer", "xxh3-64 over `data`"),
    ("data", "bytes", "as many as k, n and the blob's size say, no more and no fewer"),
)

FRAMES = f"""A blob is divided into chunks of equal size; the last one may be shorter. A reader knows the number and the size
of the chunks before its first request: they follow from the manifest, from the blob's reference, and from its codec. It refuses
a frame with other numbers, with a wrong checksum, or that is longer than its content by more than
{FRAME_OVERHEAD_BYTES // 1024} KiB. Chunks of tensors hold a multiple of {ALIGN_ELEMENTS} elements, little-endian.

The **digest** of an update, which its offer carries and the agent signs, is BLAKE3 over the BLAKE3 digests of the `data` of
its chunks, in their order, {DIGEST_BYTES} bytes each. It binds the content: the coordinator computes it while it merges, and
commits no version with an update whose digest differs. The digest of a center is xxh3-128 over its bytes; like the checksums
it finds corruption and is no protection against forgery.
"""

TIME_S = 1767225600.0
EXAMPLES: dict[type[Published], Published] = {
    Train: Train(
        time_s=TIME_S, state="training", version=12, clock=12, step=7, steps=20, loss=0.31, samples_per_s=5200.0,
        part=0, rows=360, bytes_up=1_250_000, bytes_down=1_250_000,
    ),
    AgentEval: AgentEval(time_s=TIME_S, version=12, clock=13, metrics={"accuracy": 0.913, "loss": 0.29}),
    Round: Round(
        time_s=TIME_S, version=13, closed_by="quorum 3 of 4 + 2.0 s", merged=3, late=["a4"], seconds=2.9, collect_s=2.7,
        merge_s=0.1, norm=0.82, drift=0.61, bytes_up=4_700_000, bytes_down=1_300_000,
    ),
    CenterEval: CenterEval(time_s=TIME_S, version=13, metrics={"accuracy": 0.942, "loss": 0.21}, seconds=0.08),
    RunStatus: RunStatus(
        time_s=TIME_S, task="syncline.tasks.digits:Digits", phase="training", version=13, versions=40, agents=3,
        needed=4, lost=["a4"], reason="quorum 3 of 4 + 2.0 s",
    ),
    FleetStatus: FleetStatus(time_s=TIME_S, agents=3, run="digits-3f2a1b", queued=["digits-90c411"]),
    Event: Event(
        time_s=TIME_S, event="agent-lost", level="warning", text="a4 lost: not heard of for 10.2 s", agent="a4"
    ),
}  # fmt: skip

ACCOUNTS = """## Accounts and permissions

The identity of an agent is the token after `agent.` in the subject; the broker lets an agent publish only under its own token.
Each agent has a broker account of its own, and reaches only the exports of the coordinator's account. A permission alone is
not enough: it guards the subject of a message and not its *reply* subject.
"""


def protocol() -> str:
    """Return the whole page."""
    return (
        "\n".join([INTRO, *_subjects(), VERSIONING, *_records(), *_chunks(), *_metrics(), *_accounts()]).rstrip() + "\n"
    )


def _subjects() -> Iterable[str]:
    """Yield the tables of subjects and of the streams that keep them."""
    yield "## Subjects\n"
    yield _table(("subject", "written by", "read by", "carries"), [(f"`{s}`", *rest) for s, *rest in SUBJECTS])
    yield (
        "`<sender>` is an agent's name, `coordinator` or `broker`; `<run>` is `fleet` for metrics and events of no single run. "
        f"Reserved words, which are not names of runs or agents: {', '.join(f'`{n}`' for n in sorted(subjects.RESERVED))}.\n"
    )
    yield "## What JetStream keeps\n"
    yield "All state that must survive is here: any service can be killed at any time, and reads its state again.\n"
    yield _table(("object", "holds", "written by", "how"), OBJECTS)


def _records() -> Iterable[str]:
    """Yield a table of fields for each record and each part of a record."""
    yield "## Records\n"
    yield (
        "A record travels as a msgpack map: `t`, `v`, and the fields below. *Count* is an integer from 0 to 2⁶³ − 1. "
        "A field with a question mark may be left out.\n"
    )
    records: tuple[type[Record], ...] = (*MESSAGES, Manifest)
    for record in records:
        yield f"### {record.kind}\n"
        yield f"{_doc(record)} At most {_size(record.max_bytes)}.\n"
        yield _fields(record)
    yield "### Parts of records\n"
    for part in (BlobRef, PlanEntry, Dropped, Entry, NamedDigest):
        yield f"**{_words(part.__name__)}**: {_doc(part)}\n"
        yield _fields(part)
    yield f"**verdict**: {_doc(Verdict)}\n"
    yield _table(("number", "verdict"), [(str(int(v)), v.name.lower()) for v in Verdict])
    yield (
        f"A plan of up to {_size(PLAN_INLINE_BYTES)} travels inside head; a larger one, and every roster and manifest, is a "
        "blob that head names.\n"
    )


def _chunks() -> Iterable[str]:
    """Yield the fields of a chunk, and the rules for its size and digest."""
    yield "## Chunks\n"
    yield _table(("field", "type", "meaning"), [(f"`{name}`", *rest) for name, *rest in CHUNK])
    yield FRAMES


def _metrics() -> Iterable[str]:
    """Yield each metric and the event, with an example."""
    yield "## Metrics and events\n"
    yield (
        "One JSON object a message, sent as core messages: a lost one is a gap in a plot. Numbers that JSON cannot hold (NaN, "
        "infinity) are `null`.\n"
    )
    for who, metric in METRICS:
        run = subjects.FLEET if metric is FleetStatus else RUN
        yield from _published(subjects.metrics(run, who, metric.kind), metric)
    yield from _published(subjects.events(RUN, "<sender>"), Event)


def _published(subject: str, metric: type[Published]) -> Iterable[str]:
    """Yield the section of one metric or event."""
    yield f"### `{subject}`\n"
    yield f"{_doc(metric)}\n"
    yield _fields(metric)
    yield f"```json\n{EXAMPLES[metric].model_dump_json()}\n```\n"


def _accounts() -> Iterable[str]:
    """Yield the permissions of each kind of account, read from the broker's configuration that Syncline writes."""
    people = [
        Identity("coordinator", "CORE", "C", ""),
        Identity(AGENT, "FLEET", "A", ""),
        Identity("watch", "WATCH", "W", ""),
    ]
    config = accounts_config(people)
    yield ACCOUNTS
    rows = []
    for account, body in re.findall(r'^  "(\S+)" \{\n(.*?)^  \}', config, re.DOTALL | re.MULTILINE):
        publish, subscribe = _permission(body, "publish"), _permission(body, "subscribe")
        exported = re.findall(r'^ *\{(service|stream): "(.*)"\}$', body, re.MULTILINE)
        rows.append((f"`{account}`", publish, subscribe, _lines(f"{kind} `{subject}`" for kind, subject in exported)))
    yield _table(("account", "publishes", "subscribes", "exports to the others"), rows)
    yield f"Where Syncline configures the broker, a message has at most {_size(MAX_PAYLOAD_BYTES)} (`max_payload`).\n"


def _permission(body: str, what: str) -> str:
    """Return the subjects that a user of an account may publish or subscribe."""
    found = re.search(what + r": \{(allow|deny): (.*?)\}", body)
    if found is None:
        return "everything in its account"
    listed = re.findall(r'"(.*?)"', found[2])
    return "nothing" if found[1] == "deny" else _lines(f"`{subject}`" for subject in listed)


# -- words for schemas -------------------------------------------------------------------------------------------------
def _fields(model: type[BaseModel]) -> str:
    """Return the table of a model's fields, from its JSON schema."""
    schema = model.model_json_schema()
    required = (
        schema.get("required", ()) if issubclass(model, Record) else schema["properties"]
    )  # metrics are sent whole
    rows = []
    for name, field in schema["properties"].items():
        default = f"default `{field['default']}`" if field.get("default") else ""
        meaning = "; ".join(filter(None, (field.get("description"), default)))
        rows.append((f"`{name}`" if name in required else f"`{name}` ?", _type(field), meaning))
    return _table(("field", "type", "meaning"), rows)


def _type(schema: dict[str, Any]) -> str:
    """Return the words for a JSON schema."""
    if "$ref" in schema:
        return _words(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        return ", or ".join(_type(s) for s in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    most = schema.get("maxLength")
    match schema.get("type"):
        case "null":
            return "nothing"
        case "boolean":
            return "boolean"
        case "number":
            return "number"
        case "integer":
            return _integer(schema)
        case "string" if schema.get("format") == "binary":
            return f"{most} bytes" if most == schema.get("minLength") else f"bytes, at most {most}"
        case "string" if schema.get("pattern", "") in _PATTERNS:
            return _PATTERNS[schema["pattern"]]
        case "string" if "pattern" in schema:
            return ", ".join(f"`{value}`" for value in schema["pattern"].strip("^()$").split("|"))
        case "string":
            return f"text, at most {most} characters" if most else "text"
        case "array":
            return f"list of {_type(schema['items'])}" + (
                f"; at most {schema['maxItems']}" if "maxItems" in schema else ""
            )
        case _:
            values = schema.get("additionalProperties")
            return f"map of text to {_type(values)}" if isinstance(values, dict) else "map"


def _integer(schema: dict[str, Any]) -> str:
    """Return the words for an integer with its bounds."""
    least, most = schema.get("minimum"), schema.get("maximum", schema.get("exclusiveMaximum", 1 << 63) - 1)
    if least is None:
        return "integer"
    if most == (1 << 63) - 1:
        return "count" if least == 0 else f"count, at least {least}"
    return f"integer, {least} to {most}"


_PATTERNS = {
    "^[a-z0-9-]+$": "name",
    "^[0-9a-f]{32}$": "32 hexadecimal digits",
    "^([0-9a-f]{32})?$": "32 hexadecimal digits, or empty",
    "^[a-z0-9_]+$": "name of a codec",
}


def _words(name: str) -> str:
    """Return a class name in words: `blob reference` for `BlobRef`."""
    return {
        "BlobRef": "blob reference",
        "PlanEntry": "plan entry",
        "Entry": "tensor",
        "NamedDigest": "named digest",
    }.get(name, name.lower())


def _doc(model: type) -> str:
    """Return the docstring of a model on one line."""
    return " ".join((model.__doc__ or "").split())


def _size(size: int) -> str:
    """Return a number of bytes in the largest unit that divides it."""
    for unit, bits in (("MiB", 20), ("KiB", 10)):
        if size >= 1 << bits and size % (1 << bits) == 0:
            return f"{size >> bits} {unit}"
    return f"{size} bytes"


def _lines(items: Iterable[str]) -> str:
    """Join the items of a table cell with line breaks."""
    return "<br>".join(items)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(protocol())
