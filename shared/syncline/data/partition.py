"""Partition of a data set into disjoint parts, D = ∪ D_i.

Every agent computes the whole split and takes its own part. A split is a pure function of its arguments: seeded, bit-equal for
equal arguments, with every row in exactly one part. It uses only numpy, because agents with different versions of other
libraries must agree on every row.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from syncline.errors import ConfigError
from syncline.spec.sections import Dirichlet, Iid, Natural, Partition, Shards

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """The share of the data that `Task.dataset` must return: one agent's part, or the common held-out set.

    A task calls `part.rows(len(labels), label=labels)` to get the indices of its rows among all rows.
    """

    index: int  # number of this part, from 0
    parts: int  # number of parts of the split
    how: Partition  # the section `partition` of the spec
    seed: int  # the run's seed; `how.seed` has precedence
    held_out: bool = False  # the common test set instead of an agent's part
    needed: int | None = None  # parts that the run needs; None: all. Parts beyond these may stay without rows

    def __post_init__(self) -> None:
        assert 0 <= self.index < self.parts, f"there is no part {self.index} of {self.parts}"

    @classmethod
    def test(cls, seed: int = 0) -> Part:
        """Return the part that stands for the common held-out set. `seed`: the run's seed."""
        return cls(index=0, parts=1, how=Iid(), seed=seed, held_out=True)

    def rows(self, count: int, **columns: ArrayLike) -> Rows:
        """Return the indices of this part's rows, sorted.

        Args:
            count: number of all rows.
            columns: columns by which the split may be made, each with one value per row: arrays, tensors or lists.

        Raises:
            ConfigError: the split cannot be made. If more agents joined than the data has parts for, the error is raised
                only for the parts of the additional agents.
        """
        assert not self.held_out, (
            "part.rows() was called for the held-out set, which is not split. "
            "In dataset(part), return the test set first: `if part.held_out: return ...`"
        )
        arrays = {name: _as_array(values) for name, values in columns.items()}
        try:
            return split(count, self.parts, self.how, self.seed, arrays)[self.index]
        except TooManyParts as error:
            if error.most < (self.needed or self.parts) or error.most <= self.index:
                raise
            return replace(self, parts=error.most).rows(count, **columns)


class TooManyParts(ConfigError):
    """The data can be split into `most` parts at most."""

    def __init__(self, most: int, setting: str, problem: str, hint: str) -> None:
        super().__init__(setting, problem, hint)
        self.most = most


def split(rows: int, parts: int, how: Partition, seed: int, columns: Mapping[str, NDArray[Any]]) -> list[Rows]:
    """Return the sorted row indices of each part. The parts are disjoint, not empty, and together 0 … rows − 1.

    Args:
        rows: number of all rows.
        parts: number of parts.
        how: the section `partition` of the spec; its seed has precedence over `seed`.
        seed: the run's seed.
        columns: arrays of shape (rows,) by name.

    Raises:
        ConfigError: `how` and the data do not fit together.
    """
    if parts > rows:
        raise TooManyParts(
            rows,
            "partition.parts",
            f"{parts} parts of {rows} rows: {parts - rows} of them would be empty",
            f"Use at most {rows} agents, or more data",
        )
    rng = np.random.default_rng(np.random.SeedSequence(seed if how.seed is None else how.seed))
    match how:
        case Iid():
            owner = _iid(rows, parts, rng)
        case Dirichlet():
            owner = _dirichlet(_labels(how.column, rows, columns), parts, how.alpha, rng)
        case Shards():
            owner = _shards(_labels(how.column, rows, columns), parts, how.per_agent, rng)
        case Natural():
            owner = _natural(_labels(how.column, rows, columns), parts, how.column)
    return _groups(owner, parts)


# Each kind returns the owner (part) of every row, shape (rows,); `labels` are integer codes 0 … L − 1 of shape (rows,).


def _iid(rows: int, parts: int, rng: np.random.Generator) -> Rows:
    owner = np.empty(rows, np.int64)
    owner[rng.permutation(rows)] = np.arange(rows) % parts
    return owner


def _dirichlet(labels: Rows, parts: int, alpha: float, rng: np.random.Generator) -> Rows:
    """Divide the rows of each label in proportions drawn from Dir(alpha) over the parts (arXiv:1905.12022)."""
    owner = np.empty(len(labels), np.int64)
    for rows_of_label in _groups(labels, int(labels.max()) + 1):
        shares = rng.dirichlet(np.full(parts, alpha))
        counts = _largest_remainder(shares, len(rows_of_label))
        owner[rng.permutation(rows_of_label)] = np.repeat(np.arange(parts), counts)
    return _none_empty(owner, parts)


def _shards(labels: Rows, parts: int, per_agent: int, rng: np.random.Generator) -> Rows:
    """Cut rows sorted by label into parts × per_agent shards of nearly equal size and deal them out (arXiv:1602.05629)."""
    rows, shards = len(labels), parts * per_agent
    if shards > rows:
        raise TooManyParts(
            rows // per_agent,
            "partition.per_agent",
            f"{per_agent} shards for each of {parts} parts are {shards} shards of {rows} rows",
            f"Use at most {rows // parts}, or fewer agents",
        )
    shuffled = rng.permutation(rows)
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    dealt = rng.permutation(np.arange(shards) % parts)
    owner = np.empty(rows, np.int64)
    owner[by_label] = dealt[np.arange(rows) * shards // rows]
    return owner


def _natural(labels: Rows, parts: int, column: str) -> Rows:
    """Assign whole groups, the largest first, each to the part that is smallest so far. No randomness is involved."""
    sizes = np.bincount(labels)
    if len(sizes) < parts:
        raise TooManyParts(
            len(sizes),
            "partition.parts",
            f"{parts} parts, but column {column!r} has only {len(sizes)} different values, and they stay together",
            f"Use at most {len(sizes)} agents, or name another partition.column",
        )
    smallest = [(0, part) for part in range(parts)]  # a heap
    owner_of_group = np.empty(len(sizes), np.int64)
    for group in np.argsort(-sizes, kind="stable"):
        size, part = smallest[0]
        heapq.heapreplace(smallest, (size + int(sizes[group]), part))
        owner_of_group[group] = part
    owner: Rows = owner_of_group[labels]
    return owner


def _largest_remainder(shares: NDArray[np.float64], total: int) -> Rows:
    """Return integers near shares × total with the sum `total` (Hamilton's method); the first share wins a tie."""
    exact = shares / shares.sum() * total
    counts: Rows = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts


def _none_empty(owner: Rows, parts: int) -> Rows:
    """Move one row to every empty part, each from the part that is the largest at that time."""
    sizes = np.bincount(owner, minlength=parts)
    largest = [(-int(size), part) for part, size in enumerate(sizes)]
    heapq.heapify(largest)
    rows_of: dict[int, list[int]] = {}
    for empty in np.flatnonzero(sizes == 0):
        size, donor = largest[0]
        if donor not in rows_of:
            rows_of[donor] = np.flatnonzero(owner == donor).tolist()
        heapq.heapreplace(largest, (size + 1, donor))
        owner[rows_of[donor].pop()] = empty
    return owner


def _groups(keys: Rows, count: int) -> list[Rows]:
    """Return the sorted positions of each key 0 … count − 1."""
    ends = np.cumsum(np.bincount(keys, minlength=count))
    return np.split(np.argsort(keys, kind="stable"), ends[:-1])


def _labels(name: str, rows: int, columns: Mapping[str, NDArray[Any]]) -> Rows:
    """Return the values of a column as codes 0 … L − 1, in the order of the values."""
    if name not in columns:
        known = f"Known columns: {', '.join(columns)}" if columns else "The task passes none to part.rows()"
        raise ConfigError("partition.column", f"the task's data has no column {name!r}", known)
    column = columns[name]
    if column.shape != (rows,):
        raise ConfigError(
            "partition.column",
            f"{name!r} has shape {column.shape} for {rows} rows",
            "Pass one value for each row to part.rows()",
        )
    try:
        codes: Rows = np.unique(column, return_inverse=True)[1].astype(np.int64)
    except TypeError as error:
        raise ConfigError(
            "partition.column",
            f"the values of {name!r} cannot be told apart by order: {error}",
            "Use one type of value",
        ) from None
    return codes


def _as_array(values: Any) -> NDArray[Any]:
    """Return values as an array, also those of a torch tensor on any device, without importing torch."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
