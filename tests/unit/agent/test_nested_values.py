"""Nested values as tensors and JSON: unchanged after a round trip; the error for another kind names its place."""

from __future__ import annotations

import json
import random
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from syncline.errors import ConfigError
from syncline_agent.nested_values import DEEPEST, is_finite, pack, unpack

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
KEYS = st.integers() | st.text(max_size=5) | st.tuples(st.integers(), st.booleans())


def nested(leaf: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaf, lambda v: st.lists(v) | st.lists(v).map(tuple) | st.dictionaries(KEYS, v), max_leaves=20
    )  # fmt: skip


def there_and_back(value: Any) -> Any:
    packed, tensors = pack(value, "x")
    return unpack(json.loads(json.dumps(packed)), tensors)


@given(nested(PLAIN))
def test_nested_values_come_back_with_their_types(value: Any) -> None:
    assert repr(there_and_back(value)) == repr(value)


@pytest.mark.parametrize("name", ["a.b", "a"])
def test_tensors_and_arrays_come_back_bit_for_bit(name: str) -> None:
    value = {
        "a": {"b": torch.arange(3)}, name: [torch.tensor(float("nan")), np.arange(4, dtype=np.uint32)[::2]],
        "s": np.float32(0.1), "d": np.float64(0.1), "i": np.int64(7), "c": torch.ones(2, dtype=torch.complex64),
    }  # fmt: skip
    found = there_and_back(value)
    assert found.keys() == value.keys() and repr(found) == repr(value)
    assert all(type(found[key]) is type(value[key]) for key in value)


def test_states_of_generators_and_modules_come_back() -> None:
    value = {
        "python": random.Random(3).getstate(), "numpy": np.random.default_rng(3).bit_generator.state,
        "old": np.random.RandomState(3).get_state(), "torch": torch.Generator().get_state(),
        "module": nn.Linear(2, 1).state_dict(), "counter": Counter("aab"),
    }  # fmt: skip
    found = there_and_back(value)
    assert repr(found) == repr(value)
    assert type(found["module"]) is OrderedDict and type(found["counter"]) is Counter


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": [1, {2}]}, "task: x.a.1 is a set, which an agent cannot keep on its disk"),
        ({"f": len}, "task: x.f is a builtin_function_or_method, which"),
        ({frozenset(): 1}, "task: a key of x is a frozenset, which"),
        (torch.eye(2).to_sparse(), "task: x is a tensor of layout torch.sparse_coo, which"),
        (np.array(["a"]), "task: x is a numpy array of <U1, which"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_its_place(value: Any, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        pack(value, "x")
    assert str(error.value).startswith(words)


def test_a_list_that_holds_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(ConfigError, match=rf"is more than {DEEPEST} levels deep"):
        pack(value, "x")


@pytest.mark.parametrize(
    "odd", [float("nan"), float("inf"), torch.tensor([1.0, torch.nan]), np.float32("nan"), np.array([np.inf])]
)
def test_a_number_that_is_not_finite_is_found_anywhere(odd: Any) -> None:
    assert not is_finite({"a": [1, (2.0, odd)]})
    assert is_finite({"a": [1, (2.0, torch.ones(2), np.arange(3), "nan", None, np.int64(3), torch.arange(2))]})
