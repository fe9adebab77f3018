"""Partitions D = ∪ D_i into disjoint parts: the contract of all kinds, and the properties of each."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from syncline.data.partition import Part, split
from syncline.errors import ConfigError
from syncline.spec.sections import Dirichlet, Iid, Natural, Partition, Shards

KINDS: dict[str, Partition] = {
    "iid": Iid(),
    "dirichlet": Dirichlet(kind="dirichlet"),
    "shards": Shards(kind="shards"),
    "natural": Natural(kind="natural"),
}
SEEDED = [kind for kind in KINDS if kind != "natural"]


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, int, Partition, int, dict[str, NDArray[Any]]]:
    """Arguments of `split` that fit together."""
    rows = draw(st.integers(1, 80))
    labels = draw(st.lists(st.integers(-3, 6), min_size=rows, max_size=rows))
    parts = draw(st.integers(1, rows))
    kinds: list[st.SearchStrategy[Partition]] = [
        st.just(Iid()),
        st.floats(1e-12, 1e6).map(lambda alpha: Dirichlet(kind="dirichlet", alpha=alpha)),
        st.integers(1, rows // parts).map(lambda per_agent: Shards(kind="shards", per_agent=per_agent)),
    ]
    if parts <= len(set(labels)):
        kinds.append(st.just(Natural(kind="natural")))
    return rows, parts, draw(st.one_of(kinds)), draw(st.integers(0, 2**64)), {"label": np.array(labels)}


@given(splits())
def test_parts_are_sorted_disjoint_complete_and_never_empty(
    arguments: tuple[int, int, Partition, int, dict[str, NDArray[Any]]],
) -> None:
    rows, parts = arguments[:2]
    found = split(*arguments)
    assert len(found) == parts
    assert all(part.dtype == np.int64 and len(part) and np.all(np.diff(part) > 0) for part in found)
    assert np.array_equal(np.sort(np.concatenate(found)), np.arange(rows))


@given(splits())
def test_equal_arguments_give_equal_parts_and_the_global_generator_is_not_used(
    arguments: tuple[int, int, Partition, int, dict[str, NDArray[Any]]],
) -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    first, second = split(*arguments), split(*arguments)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index]


@given(splits())
def test_the_seed_of_the_partition_wins_over_the_seed_of_the_run(
    arguments: tuple[int, int, Partition, int, dict[str, NDArray[Any]]],
) -> None:
    rows, parts, how, seed, columns = arguments
    own = how.model_copy(update={"seed": seed})
    found = zip(split(rows, parts, how, seed, columns), split(rows, parts, own, seed + 1, columns), strict=True)
    assert all(np.array_equal(a, b) for a, b in found)


@pytest.mark.parametrize("kind", SEEDED)
def test_another_seed_gives_another_split(kind: str) -> None:
    columns = {"label": np.arange(200) % 10}
    owners = {tuple(map(tuple, split(200, 4, KINDS[kind], seed, columns))) for seed in range(5)}
    assert len(owners) == 5


@pytest.mark.parametrize("kind", ["iid", "shards"])
def test_these_kinds_give_parts_of_nearly_equal_size(kind: str) -> None:
    sizes = [len(part) for part in split(103, 4, KINDS[kind], 1, {"label": np.arange(103) % 7})]
    assert max(sizes) - min(sizes) <= 2


def test_a_large_alpha_gives_every_part_the_histogram_of_the_whole() -> None:
    labels = np.repeat(np.arange(4), [400, 200, 100, 100])
    for part in split(800, 4, Dirichlet(kind="dirichlet", alpha=1e6), 3, {"label": labels}):
        assert np.allclose(np.bincount(labels[part], minlength=4), [100, 50, 25, 25], atol=2)


def test_a_small_alpha_gives_every_label_to_one_part() -> None:
    labels = np.arange(1000) % 10
    parts = split(1000, 4, Dirichlet(kind="dirichlet", alpha=1e-4), 3, {"label": labels})
    counts = np.array([np.bincount(labels[part], minlength=10) for part in parts])
    assert np.all(counts.max(axis=0) >= 98)


@given(st.integers(0, 1000))
def test_a_part_that_would_be_empty_gets_one_row_of_the_largest(seed: int) -> None:
    sizes = [len(p) for p in split(20, 8, Dirichlet(kind="dirichlet", alpha=1e-9), seed, {"label": np.zeros(20)})]
    assert sorted(sizes) == [1] * 7 + [13]


@given(st.integers(0, 1000))
def test_shards_that_align_with_labels_give_at_most_as_many_labels_as_shards(seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(8), 25))
    for part in split(200, 4, Shards(kind="shards", per_agent=2), seed, {"label": labels}):
        assert len(np.unique(labels[part])) <= 2


def test_natural_groups_stay_together_the_largest_first_on_the_smallest_part() -> None:
    speaker = np.array(list("aaaaabbbbcccdde"))
    parts = split(15, 3, Natural(kind="natural", column="speaker"), 9, {"speaker": speaker})
    assert ["".join(np.unique(speaker[part])) for part in parts] == ["a", "be", "cd"]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.data())
def test_natural_groups_are_never_split(groups: list[int], data: st.DataObject) -> None:
    column = np.array(groups)
    parts = data.draw(st.integers(1, len(set(groups))))
    held = [set(column[part].tolist()) for part in split(len(column), parts, KINDS["natural"], 0, {"label": column})]
    assert sum(len(groups_of_part) for groups_of_part in held) == len(set(groups))


def refused(rows: int, parts: int, how: Partition, columns: dict[str, NDArray[Any]]) -> str:
    with pytest.raises(ConfigError) as error:
        split(rows, parts, how, 0, columns)
    return str(error.value)


def test_more_parts_than_rows_are_refused_with_the_figures() -> None:
    assert refused(3, 5, Iid(), {}) == (
        "partition.parts: 5 parts of 3 rows: 2 of them would be empty. Use at most 3 agents, or more data"
    )


def test_an_unknown_column_is_refused_with_the_known_ones() -> None:
    how = Natural(kind="natural", column="speaker")
    assert refused(4, 2, how, {"label": np.arange(4), "role": np.arange(4)}) == (
        "partition.column: the task's data has no column 'speaker'. Known columns: label, role"
    )
    assert "The task passes none to part.rows()" in refused(4, 2, how, {})


def test_a_column_of_another_length_is_refused() -> None:
    assert refused(4, 2, KINDS["dirichlet"], {"label": np.arange(5)}) == (
        "partition.column: 'label' has shape (5,) for 4 rows. Pass one value for each row to part.rows()"
    )


def test_a_column_of_mixed_values_is_refused() -> None:
    mixed = np.array(["a", None, "b", "c"], dtype=object)
    assert refused(4, 2, KINDS["natural"], {"label": mixed}).startswith(
        "partition.column: the values of 'label' cannot be told apart by order: "
    )


def test_more_shards_than_rows_are_refused_with_the_figures() -> None:
    assert refused(10, 4, Shards(kind="shards", per_agent=3), {"label": np.arange(10)}) == (
        "partition.per_agent: 3 shards for each of 4 parts are 12 shards of 10 rows. Use at most 2, or fewer agents"
    )


def test_fewer_groups_than_parts_are_refused_with_the_figures() -> None:
    assert refused(10, 4, KINDS["natural"], {"label": np.arange(10) % 3}) == (
        "partition.parts: 4 parts, but column 'label' has only 3 different values, and they stay together. "
        "Use at most 3 agents, or name another partition.column"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_takes_labels_as_lists_arrays_or_tensors(kind: str) -> None:
    labels = np.arange(40) % 5
    for index, expected in enumerate(split(40, 3, KINDS[kind], 7, {"label": labels})):
        part = Part(index, 3, KINDS[kind], seed=7)
        for values in (labels, labels.tolist(), torch.from_numpy(labels), torch.tensor(labels, requires_grad=False)):
            assert np.array_equal(part.rows(40, label=values), expected)


def test_a_part_takes_a_column_of_text() -> None:
    rows = Part(0, 2, Natural(kind="natural", column="role"), seed=0).rows(4, role=["x", "y", "x", "y"])
    assert rows.tolist() == [0, 2]


def test_the_held_out_part_tells_the_author_of_a_task_what_to_write() -> None:
    part = Part.test()
    assert part.held_out
    with pytest.raises(AssertionError, match=r"if part\.held_out: return"):
        part.rows(10)


def test_a_part_is_frozen_and_inside_its_split() -> None:
    with pytest.raises(AssertionError, match="no part 2 of 2"):
        Part(2, 2, Iid(), seed=0)
    with pytest.raises(FrozenInstanceError):
        Part.test().index = 1  # type: ignore[misc]


def test_importing_the_module_imports_neither_torch_nor_scikit_learn() -> None:
    code = "import sys, syncline.data.partition; print([m for m in ('torch', 'sklearn', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("how", "labels", "most"),
    [
        (Natural(kind="natural"), [0, 0, 1, 1, 2, 3], 4),
        (Shards(kind="shards", per_agent=2), [0, 0, 1, 1, 2, 3], 3),
        (Shards(kind="shards", per_agent=2), [0, 1], 1),
        (Iid(), [0, 1], 2),
    ],
    ids=["natural", "shards", "shards, one part", "iid"],
)
def test_an_agent_too_many_gets_no_part_and_the_others_keep_theirs(
    how: Partition, labels: list[int], most: int
) -> None:
    before = [Part(i, most, how, seed=3, needed=1).rows(len(labels), label=labels) for i in range(most)]
    after = [Part(i, most + 1, how, seed=3, needed=1).rows(len(labels), label=labels) for i in range(most)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    with pytest.raises(ConfigError, match="partition"):
        Part(most, most + 1, how, seed=3, needed=1).rows(len(labels), label=labels)


@pytest.mark.parametrize("needed", [None, 5])
def test_a_run_that_needs_more_parts_than_there_are_gets_none(needed: int | None) -> None:
    with pytest.raises(ConfigError, match="only 4 different values"):
        Part(0, 5, Natural(kind="natural"), seed=3, needed=needed).rows(6, label=[0, 0, 1, 1, 2, 3])
