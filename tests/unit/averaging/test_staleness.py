"""Staleness weights: the contract of all, and the formula of each one's paper."""

from __future__ import annotations

import itertools
import math
from typing import Any, cast

import pytest

from syncline.averaging.staleness import STALENESS, Constant, Hinge, Polynomial, Staleness
from syncline.spec.run_spec import RunSpec, parse


@pytest.fixture(params=sorted(STALENESS))
def staleness(request: pytest.FixtureRequest) -> Staleness:
    kind: Any = STALENESS[request.param]
    return cast(Staleness, kind())


def test_a_spec_chooses_it_by_its_kind(staleness: Staleness) -> None:
    spec = parse(RunSpec, {"task": "a.b:C", "sync": {"kind": "async", "staleness": {"kind": staleness.kind}}})
    assert spec.sync.kind == "async" and spec.sync.staleness_or_default == staleness
    assert parse(RunSpec, spec.model_dump(mode="json")) == spec


def test_a_fresh_update_counts_one_and_an_older_one_never_more(staleness: Staleness) -> None:
    weights = [staleness.weight(lag) for lag in range(2000)]
    assert weights[0] == 1.0 and all(math.isfinite(w) and w >= 0 for w in weights)
    assert all(older <= newer for newer, older in itertools.pairwise(weights))


def test_they_are_their_papers() -> None:
    assert Polynomial().weight(3) == 0.5, "1 / √(1 + τ), not 1 / (1 + √τ)"
    assert [Hinge(a=10, b=4).weight(lag) for lag in (4, 5, 6)] == [1.0, 1 / 11, 1 / 21]
    assert Constant().weight(10**9) == 1.0
