"""What is read of runs: near names, the commit of a version, and a center as named tensors, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from syncline.bus import blobs
from syncline.bus.memory.bus import MemoryBroker, MemoryBus
from syncline.client import export as exporting
from syncline.client import history, runs
from syncline.errors import ConfigError, PeerError
from syncline.model.manifest import Entry, Manifest
from syncline.wire import subjects
from syncline_cli.commands.export import check_file
from unit import stored_run
from unit.stored_run import RUN, StoredRun, bucket, center, digest_of, lose_head, submitted


@pytest.fixture
async def bus() -> MemoryBus:
    return MemoryBroker().connect(subjects.COORDINATOR)


def says(caught: pytest.ExceptionInfo[ConfigError]) -> str:
    return str(caught.value)


# -- names --------------------------------------------------------------------------------------------------------------


async def test_a_bus_where_no_coordinator_has_ever_been_has_no_runs(bus: MemoryBus) -> None:
    assert await runs.names(bus) == []
    with pytest.raises(ConfigError) as caught:
        await runs.head_of(bus, "r")
    assert says(caught) == (
        "RUN: there is no run 'r'. No run was ever submitted on this broker; submit one with `syncline run SPEC.yaml`"
    )


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("digits-2", "Did you mean `digits-1`?"),
        ("Digits-1", "Did you mean `digits-1`?"),
        ("*", "Runs: digits-1, other"),
        ("x", "Runs: digits-1, other"),
    ],
)
async def test_a_run_that_is_not_there_is_answered_with_what_is(bus: MemoryBus, typed: str, hint: str) -> None:
    await submitted(bus)
    await submitted(bus, "other")
    with pytest.raises(ConfigError) as caught:
        await runs.head_of(bus, typed)
    assert says(caught) == f"RUN: there is no run {typed!r}. {hint}"


def test_of_many_runs_a_few_are_named() -> None:
    assert runs.suggestion("x", [f"run-{i}" for i in range(20)]).endswith("run-7 and 12 more")


async def test_a_run_between_its_spec_and_its_head_is_there_in_a_moment(bus: MemoryBus) -> None:
    await submitted(bus)
    await lose_head(bus)
    with pytest.raises(ConfigError, match="submitted just now"):
        await runs.head_of(bus, RUN)


# -- commits ------------------------------------------------------------------------------------------------------------


async def test_a_commit_is_the_one_under_the_highest_term(bus: MemoryBus) -> None:
    stored = await StoredRun(bus).make(3)
    await stored.log(2, term=9)
    await stored.log(2, term=10)
    await stored.log(2, term=11)  # of a history that the broker lost
    head = (await runs.head_of(bus, RUN)).model_copy(update={"term": 10})
    assert (await history.commit_of(bus, head, 2)).term == 10
    assert (await history.commit_of(bus, head, 3)).term == 1


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (4, "version 4 of digits-1 does not exist. Use a version from 1 to 3"),
        (-1, "version -1 of digits-1 does not exist. Use a version from 1 to 3"),
        (0, "version 0 of digits-1 is the initial model, which is no merge. Use a version from 1 to 3"),
        (1, "version 1 of digits-1 is no longer in the log. It holds versions 2 to 3"),
    ],
)
async def test_a_version_that_is_not_there(bus: MemoryBus, version: int, said: str) -> None:
    await StoredRun(bus).make(3)
    await bus.purge(subjects.log_stream(RUN), subjects.log_record(RUN, 1, 1))
    head = await runs.head_of(bus, RUN)
    with pytest.raises(ConfigError) as caught:
        await history.commit_of(bus, head, version)
    assert says(caught) == f"VERSION: {said}"


async def test_a_record_that_was_put_and_not_committed_is_none(bus: MemoryBus) -> None:
    stored = await StoredRun(bus).make(2)
    stored.models.append(stored.models[-1])
    await stored.log(3, term=1)
    with pytest.raises(ConfigError, match=r"version 3 .* does not exist"):
        await history.commit_of(bus, await runs.head_of(bus, RUN), 3)


async def test_a_run_without_a_version_says_so(bus: MemoryBus) -> None:
    await submitted(bus)
    with pytest.raises(ConfigError, match=r"has committed no version yet \(waiting\)"):
        await history.commit_of(bus, await runs.head_of(bus, RUN), 0)


# -- ls -----------------------------------------------------------------------------------------------------------------


async def test_runs_are_listed_the_newest_first_with_who_takes_part(bus: MemoryBus) -> None:
    await StoredRun(bus).make(3)
    await submitted(bus, "later")
    later, first = await runs.summaries(bus)
    assert (later.run, later.phase, later.version, later.agents) == ("later", "queued", 0, 0)
    assert (first.run, first.phase, first.version, first.versions) == (RUN, "training", 3, 100)
    assert (first.agents, first.slow, first.roster, first.reason) == (1, 1, 2, "2 of 2")


async def test_a_run_whose_roster_was_purged_just_now_is_listed_all_the_same(bus: MemoryBus) -> None:
    await StoredRun(bus).make(1)
    head = await runs.head_of(bus, RUN)
    assert head.roster is not None
    await bus.purge(subjects.model_stream(RUN), f"{subjects.model_prefix(RUN, head.roster.id)}.>")
    (row,) = await runs.summaries(bus)
    assert (row.run, row.roster) == (RUN, 0)


async def test_what_is_in_the_bucket_and_cannot_be_read_is_left_out(bus: MemoryBus) -> None:
    await bucket(bus)
    await bus.kv_create(subjects.RUNS_BUCKET, "odd.spec", b"rubbish")
    await bus.kv_create(subjects.RUNS_BUCKET, "odd.head", b"rubbish")
    assert await runs.summaries(bus) == []
    with pytest.raises(ConfigError, match="the head of odd cannot be read"):
        await runs.head_of(bus, "odd")


# -- export -------------------------------------------------------------------------------------------------------------


def held(model: exporting.Model) -> list[Any]:
    return [model.tensors["fc.weight"].tolist(), model.tensors["fc.bias"].tolist()]


def expected(version: int) -> list[Any]:
    flat = center(version)
    return [flat[:4].reshape(2, 2).tolist(), flat[4:].tolist()]


@pytest.mark.parametrize(("asked", "version"), [(None, 3), (3, 3), (2, 2), (1, 1)])
async def test_a_center_comes_as_named_tensors(bus: MemoryBus, asked: int | None, version: int) -> None:
    await StoredRun(bus).make(3)
    model = await exporting.fetch(bus, RUN, asked)
    assert held(model) == expected(version)
    assert model.about["version"] == version
    assert model.about["digest"] == digest_of(version)
    assert model.about["local"] == ["bn.num_batches_tracked"]


async def test_averaged_vectors_of_spectral_norm_leave_with_length_1(
    bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, bias = stored_run.LAYOUT.tensors
    unit = Entry(name=bias.name, shape=bias.shape, offset=4, elements=2, buffer=True, unit=True)
    fields = stored_run.LAYOUT.model_dump() | {"tensors": [weight.model_dump(), unit.model_dump()]}
    monkeypatch.setattr(stored_run, "LAYOUT", Manifest(**fields))
    await StoredRun(bus).make(2)
    (first, second) = held(await exporting.fetch(bus, RUN))
    assert first == expected(2)[0] and second == pytest.approx([6 / 85**0.5, 7 / 85**0.5])


@pytest.mark.parametrize("versions", [0, 1])
async def test_the_initial_model_is_version_0(bus: MemoryBus, versions: int) -> None:
    await StoredRun(bus).make(versions)
    assert held(await exporting.fetch(bus, RUN, 0)) == expected(0)


@pytest.mark.parametrize("version", [0, 1, 4, -1])
async def test_a_version_that_is_not_kept_is_refused(bus: MemoryBus, version: int) -> None:
    stored = await StoredRun(bus).make(3)
    await stored.purge(1)
    with pytest.raises(ConfigError) as caught:
        await exporting.fetch(bus, RUN, version)
    assert says(caught).startswith(f"--version: version {version} of digits-1 is not on the bus. The newest is 3; ")


async def test_a_run_that_has_not_begun_has_no_model(bus: MemoryBus) -> None:
    await submitted(bus)
    with pytest.raises(ConfigError, match="has no model yet"):
        await exporting.fetch(bus, RUN)


async def test_a_model_that_is_purged_while_it_is_fetched_gives_way_to_the_newer_one(
    bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = await StoredRun(bus).make(3)
    newest = await runs.head_of(bus, RUN)
    older = newest.model_copy(update={"version": 2, "model": stored.models[2], "digest": digest_of(2)})
    await stored.write(older)
    await stored.purge(2)
    real = blobs.get_blob

    async def moves_on(*args: Any, **kwargs: Any) -> None:
        await stored.write(newest)
        await real(*args, **kwargs)

    monkeypatch.setattr(exporting, "get_blob", moves_on)
    assert held(await exporting.fetch(bus, RUN)) == expected(3)


async def test_a_center_that_is_not_what_head_says_is_refused(bus: MemoryBus) -> None:
    stored = await StoredRun(bus).make(2)
    head = await runs.head_of(bus, RUN)
    await stored.write(head.model_copy(update={"digest": "0" * 32}))
    with pytest.raises(PeerError, match="has digest"):
        await exporting.fetch(bus, RUN)


def files(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


async def test_plain_pytorch_loads_the_file(bus: MemoryBus, tmp_path: Path) -> None:
    await StoredRun(bus).make(3)
    file = tmp_path / "m.safetensors"
    exporting.save(await exporting.fetch(bus, RUN), file)
    tensors = load_file(file)
    assert torch.equal(tensors["fc.weight"], torch.tensor(expected(3)[0]))
    assert tensors["fc.bias"].dtype == torch.float32
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert (metadata["run"], metadata["version"], metadata["term"]) == (RUN, "3", "1")
    assert metadata["digest"] == digest_of(3)
    assert files(tmp_path) == ["m.safetensors"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("m.pt", "m.pt does not end with .safetensors. Write "),
        ("gone/m.safetensors", "gone is not a directory"),
        ("there.safetensors", "exists. Name another file, or replace it with --force"),
    ],
)
def test_a_file_that_cannot_be_meant(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "there.safetensors").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        check_file(tmp_path / name, force=False)
    assert said in says(caught)
    check_file(tmp_path / "there.safetensors", force=True)


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    model = exporting.Model(
        {"w": np.zeros(2, dtype=np.float32)}, dict.fromkeys(("run", "version", "term", "digest"), "")
    )
    (tmp_path / "m.safetensors").mkdir()
    with pytest.raises(ConfigError, match=r"^FILE: "):
        exporting.save(model, tmp_path / "m.safetensors")
    assert files(tmp_path) == ["m.safetensors"]
