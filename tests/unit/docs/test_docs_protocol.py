"""docs/protocol.md is what the code says, and leaves nothing out."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
from protocol_reference import EXAMPLES, protocol

from syncline.model.manifest import Manifest
from syncline.observe.telemetry import METRICS, Event, Published
from syncline.spec.run_spec import RunSpec
from syncline.wire import subjects
from syncline.wire.messages import MESSAGES, Record
from syncline_coordinator.reservation import Reservation

PAGE = Path(__file__).parents[3] / "docs" / "protocol.md"


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text()


def test_the_page_is_current(page: str) -> None:
    assert page == protocol(), "docs/protocol.md is not what the code says: run `make docs`, and look at the difference"


def test_every_record_with_every_field_is_there(page: str) -> None:
    records: tuple[type[Record], ...] = (*MESSAGES, Manifest)
    for record in records:
        section = page.partition(f"\n### {record.kind}\n")[2].partition("\n### ")[0]
        assert re.findall(r"^\| `(\w+)`", section, re.MULTILINE) == list(record.model_fields)


def test_every_subject_is_there(page: str) -> None:
    placeholders = {"run": "<run>", "agent": "<agent>", "blob": "<blob>", "who": "<sender>", "what": "<kind>"}
    placeholders |= {"version": "<version>", "term": "<term>"}
    for name, make in inspect.getmembers(subjects, inspect.isfunction):
        taken = inspect.signature(make).parameters
        if make.__module__ == subjects.__name__ and set(taken) <= set(placeholders):
            made = make(**{parameter: placeholders[parameter] for parameter in taken})
            assert f"`{made}`" in page or f"`{made}.<k>`" in page, f"{name}: {made} is missing"


def test_every_stream_of_a_run_takes_the_subjects_that_the_page_says_are_kept(page: str) -> None:
    layout = Manifest(dtype="fp32", elements=1, chunk_elements=1024, tensors=[])
    streams = Reservation.of(RunSpec(task="a:B"), layout, agents=1).streams("<run>")
    assert re.findall(r"^\| stream `(.*?)`", page, re.MULTILINE) == [s.name for s in streams]
    kept = {s for s, row in re.findall(r"^\| `(syncline\.v1\.\S+)` \|(.*)", page, re.MULTILINE) if "JetStream" in row}
    taken = [re.escape(s).replace(r"\*", r"[^.]+").replace(">", ".+") for stream in streams for s in stream.subjects]
    taken = [pattern.replace("<run.+", "<run>") for pattern in taken]
    assert kept and all(any(re.fullmatch(pattern, subject) for pattern in taken) for subject in kept)


def test_write_once_streams_are_said_to_be(page: str) -> None:
    layout = Manifest(dtype="fp32", elements=1, chunk_elements=1024, tensors=[])
    for stream in Reservation.of(RunSpec(task="a:B"), layout, agents=1).streams("<run>"):
        (row,) = re.findall(rf"^\| stream `{stream.name}` .*", page, re.MULTILINE)
        assert ("one message for ever" in row) is stream.write_once


def test_every_example_is_a_metric_as_it_is_published(page: str) -> None:
    shown = [json.loads(text) for text in re.findall(r"```json\n(.*?)\n```", page, re.DOTALL)]
    assert len(shown) == len(METRICS) + 1
    kinds: list[type[Published]] = [*(metric for _, metric in METRICS), Event]
    for fields, metric in zip(shown, kinds, strict=True):
        assert metric.model_validate(fields) == EXAMPLES[metric]
